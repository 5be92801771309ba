"""Downloads against a hub on this machine that refuses, stalls, breaks off and lies.

One process each resolves all models of the fake hub, with a token in its environment that must never show up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from helpers.fake_hub import COMMIT, TOKEN, Hub, environment, serving
from lora_scripts.models.hub import pick_weights

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


def later_files(texts: tuple[str, ...], listed: tuple[str, ...], variant: str = "", **unet: object) -> dict[str, bytes]:
    """A model of SDXL's kind: the text encoders that it has, and those that its index lists as there."""
    index: dict[str, object] = {"_class_name": "StableDiffusionXLPipeline"}
    files = {"unet/config.json": json.dumps({"in_channels": 4, "addition_embed_type": "text_time"} | unet).encode()}
    files |= {"scheduler/scheduler_config.json": b'{"prediction_type": "epsilon"}'}
    for part in ("unet", "vae", *texts):
        stem = "model" if part in texts else "diffusion_pytorch_model"
        files[f"{part}/{stem}{variant}.safetensors"] = WEIGHTS["text_encoder" if part in texts else part]
    for part in ("text_encoder", "text_encoder_2"):
        index[part] = ["transformers", "CLIPTextModel"] if part in listed else [None, None]
        index[part.replace("text_encoder", "tokenizer")] = index[part]
    for part in texts:
        files[f"{part.replace('text_encoder', 'tokenizer')}/vocab.json"] = b"{}"
        files[f"{part}/config.json"] = b"{}"
    files["sd_xl_base_1.0.safetensors"] = b"the same model in one file, 7 GB that nobody needs twice"
    return files | {"model_index.json": json.dumps(index).encode()}


BOTH = ("text_encoder", "text_encoder_2")
REPOSITORIES = {
    "u/xl": later_files(BOTH, BOTH, cross_attention_dim=2048),
    "u/xl-half": later_files(BOTH, BOTH, ".fp16", cross_attention_dim=2048),
    "u/xl-lacking": later_files(BOTH[:1], BOTH, cross_attention_dim=2048),
    "u/refiner": later_files(BOTH[1:], BOTH[1:], cross_attention_dim=1280),
    "u/fine": model_files(),
    "u/drops": model_files() | {"unet/diffusion_pytorch_model.safetensors": LARGE},
    "u/damaged": model_files(),
    "u/pickles": model_files(ending="bin"),
    "u/sd3": model_files("StableDiffusion3Pipeline"),
    "u/onefile": {"model.safetensors": WEIGHTS["unet"]},
    "u/failing-later": model_files(),
}
STATUSES = {"u/gated": 401, "u/forbidden": 403, "u/none": 404, "u/busy": 429, "u/down": 500}
HUB = Hub(
    REPOSITORIES,
    STATUSES,
    drops={"u/drops": "unet/diffusion"},
    damages={"u/damaged": "unet/diffusion"},
    fails={"u/failing-later": "vae/"},
)


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
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=environment(endpoint, home),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=home,
    )
    results: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        results |= json.loads(line)
    assert results.keys() == set(names), done.stderr
    return results, done.stdout + done.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], str]:
    with serving(HUB) as endpoint:
        return resolve_in_process([*REPOSITORIES, *STATUSES], endpoint, tmp_path_factory.mktemp("hub"))


@pytest.mark.fault(24)
def test_a_model_is_fetched_once_asked_and_nothing_beside_it(answers: tuple) -> None:
    kind, path = answers[0]["u/fine"]
    assert kind == "ok"
    for name in ("model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert (Path(path) / name).read_bytes() == REPOSITORIES["u/fine"][name]
    fetched = {path for command, path, _ in HUB.log if command == "GET" and path.startswith("/u/fine/resolve")}
    assert not any("fp16" in path or "README" in path for path in fetched)
    assert len(fetched) == 6


@pytest.mark.fault(24)
@pytest.mark.parametrize(("name", "variant"), [("u/xl", ""), ("u/xl-half", ".fp16")])
def test_an_sdxl_model_comes_with_both_text_encoders_and_tokenizers(answers: tuple, name: str, variant: str) -> None:
    kind, path = answers[0][name]
    assert kind == "ok", path
    wanted = {
        *(f"{part}/model{variant}.safetensors" for part in BOTH),
        *(f"{part}/diffusion_pytorch_model{variant}.safetensors" for part in ("unet", "vae")),
        *("text_encoder/config.json", "text_encoder_2/config.json", "tokenizer/vocab.json", "tokenizer_2/vocab.json"),
        *("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"),
    }
    assert {file.relative_to(path).as_posix() for file in Path(path).rglob("*") if file.is_file()} == wanted


@pytest.mark.fault(22)
def test_a_refiner_and_a_model_that_lacks_a_listed_part_are_refused_by_name(answers: tuple) -> None:
    kind, said = answers[0]["u/refiner"]
    assert kind == "error"
    assert "this is an SDXL refiner, which no LoRA is trained on" in said
    fetched = [path for command, path, _ in HUB.log if command == "GET" and path.startswith("/u/refiner/resolve")]
    assert not any("safetensors" in path for path in fetched)
    kind, said = answers[0]["u/xl-lacking"]
    assert kind == "error"
    assert "text_encoder_2" in said


@pytest.mark.fault(24)
def test_a_download_that_breaks_at_90_percent_goes_on_there(answers: tuple) -> None:
    kind, path = answers[0]["u/drops"]
    assert kind == "ok"
    assert (Path(path) / "unet/diffusion_pytorch_model.safetensors").read_bytes() == LARGE
    ranges = [asked for _, path, asked in HUB.log if path.startswith("/u/drops/resolve") and "unet/diffusion" in path]
    starts = [int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges if asked]
    assert starts
    assert max(starts) >= 20_000_000


@pytest.mark.fault(24)
def test_a_file_with_another_hash_is_deleted_and_told(answers: tuple, tmp_path: Path) -> None:
    kind, message = answers[0]["u/damaged"]
    assert kind == "error"
    assert (
        "unet/diffusion_pytorch_model.safetensors arrived damaged and was deleted. Run the same command again."
        in message
    )


@pytest.mark.fault(24)
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
        ("u/sd3", "this is a Stable Diffusion 3 model; this version trains sd15"),
    ],
)
def test_each_refusal_ends_in_its_own_message(answers: tuple, name: str, message: str) -> None:
    kind, told = answers[0][name]
    assert kind == "error"
    assert told.startswith(f"base_model {name}: ")
    assert message in told


@pytest.mark.fault(22)
@pytest.mark.fault(24)
def test_weights_of_an_untrained_family_are_not_fetched(answers: tuple) -> None:
    assert not any("safetensors" in path for _, path, _ in HUB.log if path.startswith("/u/sd3/"))


@pytest.mark.fault(24)
def test_the_token_is_never_shown(answers: tuple) -> None:
    assert TOKEN not in answers[1]
    assert "secretsecret" not in answers[1]


@pytest.mark.fault(24)
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
