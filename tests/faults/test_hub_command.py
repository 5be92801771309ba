"""Training on a hub's model through the command: refused, broken off, lied to, and without any network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from helpers.fake_hub import TOKEN, Hub, environment, serving
from helpers.tiny_diffusion import save_folder, tiny_parts

Settings = Callable[..., dict[str, Any]]

SCRIPT = """
import contextlib, io, json, sys
from lora_scripts.cli import main
for config in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["train", "--config", config])
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def train(runs: Mapping[str, dict[str, Any]], endpoint: str, home: Path) -> tuple[dict[str, tuple[int, str, str]], str]:
    """Exit code and output of each run, one after the other in one process, and all that the process said."""
    configs = []
    for number, values in enumerate(runs.values()):
        configs.append(home / f"{number}.yaml")
        configs[-1].write_text(yaml.safe_dump(values), "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, configs)],
        env=environment(endpoint, home),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        cwd=home,
        check=False,
    )
    answers = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == len(runs), done.stderr
    return dict(zip(runs, answers, strict=True)), done.stdout + done.stderr


@pytest.mark.fault(24)
def test_hub_that_fails_ends_in_plain_words_a_broken_download_goes_on_and_then_no_network_is_needed(
    settings: Settings, tiny_sd_folder: Path, tmp_path: Path
) -> None:
    files = {
        path.relative_to(tiny_sd_folder).as_posix(): path.read_bytes()
        for path in tiny_sd_folder.rglob("*")
        if path.is_file()
    }
    hub = Hub(
        {"u/breaks": files, "u/lies": files},
        {"u/gated": 401, "u/busy": 429, "u/down": 500},
        drops={"u/breaks": "text_encoder/model"},
        damages={"u/lies": "unet/diffusion"},
    )

    def run(model: str, name: str = "", **changes: Any) -> dict[str, Any]:
        folder = str(tmp_path / "runs" / (name or model.replace("/", "-")))
        return settings(base_model=model, allow_download=True, output_dir=folder, max_steps=1, **changes)

    with serving(hub) as endpoint:
        answers, said = train(
            {model: run(model) for model in (*hub.statuses, "u/lies", "u/breaks")}, endpoint, tmp_path
        )
    messages = {
        "u/gated": "base_model u/gated: the hub refused access (401)",
        "u/busy": "base_model u/busy: the hub takes no more requests for now (429)",
        "u/down": "base_model u/down: the hub is out of order (500)",
        "u/lies": "base_model u/lies: unet/diffusion_pytorch_model.safetensors arrived damaged and was deleted",
    }
    for model, message in messages.items():
        code, _, err = answers[model]
        assert code == 2
        assert message in err
        assert "Traceback" not in err
    code, out, err = answers["u/breaks"]
    assert code == 0, err
    assert "Use it:" in out
    assert hub.dropped == {"text_encoder/model.safetensors"}
    (kept,) = (tmp_path / "hub" / "models--u--breaks" / "snapshots").iterdir()
    assert (kept / "text_encoder" / "model.safetensors").read_bytes() == files["text_encoder/model.safetensors"]

    # No network any more: what is here trains, what is not is told.
    answers, also_said = train(
        {
            "cached": run("u/breaks", "again"),
            "not asked": run("u/other") | {"allow_download": False},
            "unreachable": run("u/other"),
        },
        "http://127.0.0.1:9",
        tmp_path,
    )
    assert answers["cached"][0] == 0, answers["cached"][2]
    assert answers["not asked"][0] == answers["unreachable"][0] == 2
    assert "not in the local hub cache" in answers["not asked"][2]
    assert "the hub could not be reached" in answers["unreachable"][2]

    # The token went to the hub and nowhere else.
    assert "secretsecret" not in said + also_said
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


@pytest.mark.fault(24)
def test_sdxl_is_fetched_with_both_text_encoders_and_then_trains_without_a_network(
    settings: Settings, tmp_path: Path
) -> None:
    folder = save_folder(tiny_parts("sdxl"), tmp_path / "tiny-xl")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub = Hub(
        {"u/xl": files, "u/lies": files},
        drops={"u/xl": "text_encoder_2/model"},
        damages={"u/lies": "text_encoder_2/model"},
    )

    def run(model: str, name: str) -> dict[str, Any]:
        changes = {"train_text_encoder": True, "allow_download": True, "max_steps": 1}
        return settings(base_model=model, output_dir=str(tmp_path / "runs" / name), resolution=64, **changes)

    with serving(hub) as endpoint:
        answers, _ = train({name: run(f"u/{name}", name) for name in ("xl", "lies")}, endpoint, tmp_path)
    assert answers["xl"][0] == 0, answers["xl"][2]
    assert hub.dropped == {"text_encoder_2/model.safetensors"}
    assert answers["lies"][0] == 2
    assert "base_model u/lies: text_encoder_2/model.safetensors arrived damaged and was deleted" in answers["lies"][2]

    unfinished = run("u/lies", "unfinished") | {"allow_download": False}
    answers, _ = train({"again": run("u/xl", "again"), "unfinished": unfinished}, "http://127.0.0.1:9", tmp_path)
    assert answers["again"][0] == 0, answers["again"][2]
    assert "its text_encoder_2 never arrived" in answers["unfinished"][2]
    with safe_open(tmp_path / "runs" / "again" / "again.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
        names = file.keys()
    assert any(name.startswith("lora_te2_") for name in names)


@pytest.mark.fault(24)
def test_language_model_is_fetched_once_checked_and_then_found_without_a_network(
    language_settings: Settings, tiny_language_model: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_language_model.iterdir()}
    hub = Hub(
        {
            "u/breaks": files | {"pytorch_model.bin": b"a pickle", "original/consolidated.safetensors": b"not needed"},
            "u/lies": files,
            "u/pickle": {name: data for name, data in files.items() if not name.endswith("safetensors")},
        },
        drops={"u/breaks": "model.safe"},
        damages={"u/lies": "model.safe"},
    )

    def run(model: str, name: str = "") -> dict[str, Any]:
        folder = str(tmp_path / "runs" / (name or model.replace("/", "-")))
        return language_settings(base_model=model, allow_download=True, output_dir=folder, max_steps=1)

    with serving(hub) as endpoint:
        answers, _ = train({model: run(model) for model in hub.repositories}, endpoint, tmp_path)
    assert answers["u/breaks"][0] == 0, answers["u/breaks"][2]
    assert "model.safetensors arrived damaged and was deleted" in answers["u/lies"][2]
    assert "no .safetensors file for its weights" in answers["u/pickle"][2]
    (kept,) = (tmp_path / "hub" / "models--u--breaks" / "snapshots").iterdir()
    assert {path.name for path in kept.iterdir()} == set(files)

    answers, _ = train(
        {"cached": run("u/breaks", "again"), "unfinished": run("u/lies", "x") | {"allow_download": False}},
        "http://127.0.0.1:9",
        tmp_path,
    )
    assert answers["cached"][0] == 0, answers["cached"][2]
    assert "its weights never arrived" in answers["unfinished"][2]
    card = (tmp_path / "runs" / "again" / "again" / "adapter_config.json").read_text("utf-8")
    assert json.loads(card)["base_model_name_or_path"] == "u/breaks"
