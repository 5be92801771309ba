"""Downloads against a hub on this machine that refuses, stalls, breaks off and lies.

One process each resolves all models of the fake hub, with a token in its environment that must never show up.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save

from lora_scripts.models.hub import pick_weights

TOKEN = "hf_" + "secretsecret" * 3
COMMIT = "1" * 40
LARGE = save({"weight": torch.randn(2500, 2500)})
"""25 MB: the client keeps what came of a broken download in pieces of 10 MB."""
WEIGHTS = {part: save({"weight": torch.randn(300, 300)}) for part in ("unet", "vae", "text_encoder")}


def model_files(pipeline: str = "StableDiffusionPipeline", ending: str = "safetensors") -> dict[str, bytes]:
    return {
        "model_index.json": json.dumps({"_class_name": pipeline}).encode(),
        "README.md": b"# a model",
        "unet/config.json": b'{"_class_name": "UNet2DConditionModel", "in_channels": 4}',
        "scheduler/scheduler_config.json": b'{"prediction_type": "epsilon"}',
        f"unet/diffusion_pytorch_model.{ending}": WEIGHTS["unet"],
        f"unet/diffusion_pytorch_model.fp16.{ending}": b"never asked for",
        f"vae/diffusion_pytorch_model.{ending}": WEIGHTS["vae"],
        f"text_encoder/model.{ending}": WEIGHTS["text_encoder"],
    }


REPOSITORIES = {
    "u/fine": model_files(),
    "u/drops": model_files() | {"unet/diffusion_pytorch_model.safetensors": LARGE},
    "u/damaged": model_files(),
    "u/pickles": model_files(ending="bin"),
    "u/sdxl": model_files("StableDiffusionXLPipeline"),
    "u/onefile": {"model.safetensors": WEIGHTS["unet"]},
    "u/failing-later": model_files(),
}
STATUSES = {"u/gated": 401, "u/forbidden": 403, "u/none": 404, "u/busy": 429, "u/down": 500}


class FakeHub(BaseHTTPRequestHandler):
    log: ClassVar[list[tuple[str, str, str | None]]] = []
    dropped: ClassVar[set[str]] = set()

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        FakeHub.log.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        repo, rest = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
        if repo in STATUSES:
            self.reply(STATUSES[repo], json.dumps({"error": "no"}).encode())
        elif rest.startswith("resolve/"):
            self.send_file(repo, rest.split("/", 2)[2], body)
        else:
            siblings = [
                {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": hashlib.sha1(content).hexdigest(),
                    **lfs(name, content),
                }
                for name, content in REPOSITORIES[repo].items()
            ]
            self.reply(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def send_file(self, repo: str, name: str, body: bool) -> None:
        content = REPOSITORIES[repo][name]
        if repo == "u/failing-later" and name.startswith("vae/") and body:
            self.reply(503, b"")
            return
        etag = lfs(name, content)["lfs"]["sha256"] if lfs(name, content) else hashlib.sha1(content).hexdigest()
        if repo == "u/damaged" and name.startswith("unet/diffusion"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = 0
        if body and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        drop = body and repo == "u/drops" and name.startswith("unet/diffusion") and name not in FakeHub.dropped
        stop = len(content) * 9 // 10 if drop else len(content)
        self.reply(206 if start else 200, content[start:], headers, body=body, send=stop - start)
        if drop:
            FakeHub.dropped.add(name)
            self.close_connection = True

    def reply(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        body: bool = True,
        send: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:send])


def lfs(name: str, content: bytes) -> dict[str, dict]:
    if not name.endswith((".safetensors", ".bin")):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}


SCRIPT = """
import json, sys
from lora_scripts.errors import ModelError
from lora_scripts.models.source import resolve_base_model
for name in sys.argv[1:]:
    try:
        model = resolve_base_model(name, allow_download=True)
        print(json.dumps({name: ["ok", str(model.path)]}))
    except ModelError as error:
        print(json.dumps({name: ["error", str(error)]}))
"""


def resolve_in_process(names: list[str], endpoint: str, home: Path) -> tuple[dict[str, list[str]], str]:
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "LORA_SCRIPTS_CACHE": str(home / "ours"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[3] / "src"),
        "NO_PROXY": "*",
    }
    for unwanted in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        environment.pop(unwanted, None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], env=environment, capture_output=True, text=True, timeout=240, cwd=home
    )
    results: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        results |= json.loads(line)
    assert results.keys() == set(names), done.stderr
    return results, done.stdout + done.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return resolve_in_process([*REPOSITORIES, *STATUSES], endpoint, tmp_path_factory.mktemp("hub"))
    finally:
        server.shutdown()
        server.server_close()


def test_a_model_is_fetched_once_asked_and_nothing_beside_it(answers: tuple) -> None:
    kind, path = answers[0]["u/fine"]
    assert kind == "ok"
    for name in ("model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (Path(path) / name).read_bytes() == REPOSITORIES["u/fine"][name]
    fetched = {path for command, path, _ in FakeHub.log if command == "GET" and path.startswith("/u/fine/resolve")}
    assert not any("fp16" in path or "README" in path for path in fetched)
    assert len(fetched) == 6


def test_a_download_that_breaks_at_90_percent_goes_on_there(answers: tuple) -> None:
    kind, path = answers[0]["u/drops"]
    assert kind == "ok"
    assert (Path(path) / "unet/diffusion_pytorch_model.safetensors").read_bytes() == LARGE
    ranges = [
        asked for _, path, asked in FakeHub.log if path.startswith("/u/drops/resolve") and "unet/diffusion" in path
    ]
    starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges if asked]
    assert starts
    assert max(starts) >= 20_000_000


def test_a_file_with_another_hash_is_deleted_and_told(answers: tuple, tmp_path: Path) -> None:
    kind, message = answers[0]["u/damaged"]
    assert kind == "error"
    assert (
        "unet/diffusion_pytorch_model.safetensors arrived damaged and was deleted. Run the same command again."
        in message
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("u/gated", "the hub refused access (401)"),
        ("u/forbidden", "the hub refused access (403)"),
        ("u/none", "the hub has no such model (404)"),
        ("u/busy", "the hub takes no more requests for now (429). Wait some minutes"),
        ("u/down", "the hub is out of order (500). Run the same command again later"),
        ("u/failing-later", "the hub is out of order (503)"),
        ("u/pickles", "no .safetensors file for its unet; pickles are never loaded"),
        ("u/onefile", "not in the diffusers layout (no model_index.json)"),
        ("u/sdxl", "this is an SDXL model; this version trains sd15"),
    ],
)
def test_each_refusal_ends_in_its_own_message(answers: tuple, name: str, message: str) -> None:
    kind, told = answers[0][name]
    assert kind == "error"
    assert told.startswith(f"base_model {name}: ")
    assert message in told


def test_weights_of_an_untrained_family_are_not_fetched(answers: tuple) -> None:
    assert not any("safetensors" in path for _, path, _ in FakeHub.log if path.startswith("/u/sdxl/"))


def test_the_token_is_never_shown(answers: tuple) -> None:
    assert TOKEN not in answers[1]
    assert "secretsecret" not in answers[1]


def test_without_a_network_a_cached_model_works_and_another_is_refused(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--u--fine"
    for name, content in REPOSITORIES["u/fine"].items():
        file = cached / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    results, output = resolve_in_process(["u/fine", "u/other"], "http://127.0.0.1:9", tmp_path)
    assert results["u/fine"][0] == "ok"
    kind, told = results["u/other"]
    assert kind == "error"
    assert "the hub could not be reached, or the download broke off" in told
    assert TOKEN not in output


@pytest.mark.parametrize(
    ("names", "picked"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["diffusion_pytorch_model.fp16.safetensors", "x.bin"], ["diffusion_pytorch_model.fp16.safetensors"]),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], ["model.safetensors.index.json"]),
        (["diffusion_pytorch_model.bin", "config.json"], []),
    ],
)
def test_plain_weights_come_before_half_precision_and_shards_by_their_index(
    names: list[str], picked: list[str]
) -> None:
    assert pick_weights(names) == picked
