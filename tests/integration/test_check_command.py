"""`lora-scripts check` as a user types it: what stands on the terminal, the JSON, the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.checked_sets import clean_set, write_captions
from lora_scripts.cli import main
from lora_scripts.demo import demo_config, draw_pictures

Settings = Callable[..., dict[str, Any]]
Check = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs the command on a config with these settings."""

    def run(*options: str, **changes: Any) -> tuple[int, str, str]:
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(settings(**changes)), "utf-8")
        capsys.readouterr()
        code = main(["check", "--config", str(path), *options])
        return code, *capsys.readouterr()

    return run


def spoil_captions(folder: Path) -> None:
    """Leaves three of eight pictures a caption."""
    write_captions(folder, {"00.png": "a cat", "01.png": "a dog", "02.png": "a fish"})


def test_good_run_is_predicted_and_exits_with_0(check: Check, tmp_path: Path) -> None:
    code, out, err = check()
    assert (code, err) == (0, "")
    assert out.startswith("8 of 8 pictures can be trained on.")
    assert "Predicted: about" in out
    assert "memory" in out
    assert not (tmp_path / "run").exists()  # a check starts no run


def test_no_model_leaves_time_and_memory_out(check: Check) -> None:
    code, out, _ = check("--no-model")
    assert code == 0
    assert "6 steps of batch 2" in out
    assert "memory" not in out


def test_what_auto_comes_to_is_shown(check: Check) -> None:
    code, out, _ = check(batch_size="auto", effective_batch=8, memory_limit_gb=0.0013, resolution=64)
    assert code == 0
    assert "6 steps of batch 8" in out
    assert "usable; batch 8 as 4 passes of 2, checkpointing off." in out


def test_memory_too_small_for_any_cut_is_amber(check: Check) -> None:
    code, out, _ = check("--json", batch_size="auto", memory_limit_gb=0.0001)
    findings = {finding["code"]: finding["level"] for finding in json.loads(out)["findings"]}
    assert (code, findings["memory-short"]) == (0, "amber")


def test_red_exits_with_2_and_force_overrides(check: Check, pictures: Path) -> None:
    spoil_captions(pictures)
    code, out, _ = check("--no-model")
    assert code == 2
    assert "RED    5 of 8 pictures have no caption" in out
    assert out.rstrip().endswith("Blocked by 1 red finding. --force goes on all the same.")
    assert check("--no-model", "--force")[0] == 0


def test_json_is_all_that_stands_on_standard_output(check: Check, pictures: Path) -> None:
    spoil_captions(pictures)
    code, out, _ = check("--json")
    report = json.loads(out)
    assert code == 2
    assert (report["format"], report["verdict"], report["pictures"]) == (1, "blocked", {"total": 8, "trained": 3})
    (red,) = [finding for finding in report["findings"] if finding["level"] == "red"]
    assert red["code"] == "captions-missing"
    assert len(red["names"]) == 5
    assert report["prediction"]["steps"] == 6
    assert report["prediction"]["total_seconds"] > 0


def test_batch_that_the_run_would_refuse_is_red_beside_its_cause(check: Check, pictures: Path) -> None:
    write_captions(pictures, {"00.png": "a cat"})
    code, out, _ = check("--no-model", "--json")
    assert code == 2
    red = {finding["code"] for finding in json.loads(out)["findings"] if finding["level"] == "red"}
    assert red == {"captions-missing", "batch-never-filled"}


def test_overrides_count(check: Check) -> None:
    assert "99 steps" in check("--no-model", "--set", "max_steps=99")[1]


def test_folder_without_any_usable_picture_is_a_red_finding(check: Check, pictures: Path) -> None:
    for path in pictures.glob("*.png"):
        path.write_bytes(b"")
    code, out, _ = check("--no-model", "--json")
    assert code == 2
    assert [finding["code"] for finding in json.loads(out)["findings"]] == ["no-pictures"]


def test_mistake_in_the_settings_is_told_as_by_train(check: Check) -> None:
    code, out, err = check(lora_rnak=8)
    assert (code, out) == (2, "")
    assert "lora_rnak: no such setting. Did you mean lora_rank?" in err


def test_second_check_finds_the_measurements_of_the_first(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check("--no-model")
    monkeypatch.delattr("lora_scripts.preflight.gather.measure")
    assert check("--no-model")[:2] == first[:2]


def test_bare_folder_is_checked_without_config_and_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    captions = clean_set(folder, 6)
    captions["03.png"] += ", and" + " many small words" * 40
    write_captions(folder, captions)
    assert main(["check", "--input", str(folder), "--resolution", "128"]) == 0
    out = capsys.readouterr().out
    assert "1 caption is longer than the text encoder reads." in out
    assert "03.png (not read: '" in out
    assert "must be enlarged" not in out
    assert main(["check", "--input", str(folder)]) == 0
    assert "6 pictures must be enlarged to fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "nowhere"], "nowhere: no such folder"),
        (["--input", ".", "--set", "max_steps=3"], "--set: goes with --config"),
        (["--config", "x.yaml", "--resolution", "512"], "--resolution: goes with --input"),
    ],
)
def test_options_that_make_no_sense_are_told(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words]) == 2
    assert message in capsys.readouterr().err


def test_pictures_of_the_demo_give_nothing_red(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_pictures(tmp_path / "pictures", "ink wash", 42)
    write_captions(tmp_path / "pictures", {f"{i:02d}.png": f"a picture of thing {i}" for i in range(1, 25)})
    demo_config(tmp_path, "ink wash", 42)
    assert main(["check", "--config", str(tmp_path / "demo.yaml"), "--no-model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["red"] == 0
