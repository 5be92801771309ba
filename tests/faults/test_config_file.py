"""Faults in a run's settings, through the command: one message, exit code 2, nothing started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import commands

Settings = Callable[..., dict[str, Any]]

HEAD = "train_data_dir: pictures\nbase_model: model.safetensors\noutput_dir: run\n"
ALIAS_BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

FAULTS = {
    "unknown key": (HEAD + "lora_rnak: 8\n", ["my.yaml line 4: lora_rnak: no such setting. Did you mean lora_rank?"]),
    "word for a number": (HEAD + "learning_rate: fast\n", ["line 4: learning_rate: should be a valid number"]),
    "negative": (
        HEAD + "learning_rate: -1e-4\n",
        ["line 4: learning_rate: should be greater than 0 (it says '-1e-4')"],
    ),
    "negative batch": (
        HEAD + "batch_size: -1\n",
        ["line 4: batch_size: should be greater than or equal to 1, or must be one of 'auto' (it says -1)"],
    ),
    "not a number": (HEAD + "learning_rate: .nan\n", ["line 4: learning_rate: must be a finite number (it says nan)"]),
    "infinite": (HEAD + "max_grad_norm: 1e999\n", ["line 4: max_grad_norm: must be a finite number"]),
    "alias bomb": (HEAD + ALIAS_BOMB, ["my.yaml line 5: anchors and aliases (&, *) are not allowed"]),
    "10 MB": (HEAD + "#" * 10_000_000, ["bytes; a config has at most 1,000,000"]),
    "nested without end": (HEAD + "exclude: " + "[" * 9000, ["is not valid YAML"]),
    "python object": (
        HEAD + "seed: !!python/object/apply:os.getpid []\n",
        ["line 4: could not determine a constructor"],
    ),
    "number of 5,000 digits": (HEAD + "seed: " + "9" * 5000, ["is not valid YAML"]),
    "NUL in a path": (HEAD.replace("run", '"ru\\0n"'), ["line 3: output_dir: holds a NUL character"]),
    "half a character": (HEAD + 'trigger_word: "\\ud800"\n', ["line 4: trigger_word: holds half of a character"]),
    "unknown home": (HEAD.replace("run", "~nobody-here/run"), ["line 3: output_dir: names a user whose home folder"]),
    "several at once": (
        HEAD
        + "lora_rnak: 8\nbatch_size: 0\nlearning_rate: .nan\nwarmup_steps: 9\nmax_steps: 5\nsample_every: 0\nsample_seed: 1\n",
        [
            "line 4: lora_rnak: no such setting",
            "line 5: batch_size: should be greater than or equal to 1",
            "line 6: learning_rate: must be a finite number",
            "line 7: warmup_steps: 9 is not below max_steps (5)",
            "line 10: sample_seed: has no effect because sample_every is 0",
        ],
    ),
}


@pytest.mark.fault(21)
@pytest.mark.parametrize("kind", FAULTS)
def test_fault_is_one_message_with_its_line_and_nothing_is_started(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, messages = FAULTS[kind]
    code, out, err = commands.train(text, tmp_path, capsys)
    assert code == 2
    assert out == ""
    assert all(message in err for message in messages), err
    assert len(err.splitlines()) == len(messages)
    assert all(len(line) < 400 for line in err.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps=" + "9" * 5000, "--set max_steps: unable to parse"),
        ("seed=" + "[" * 5000, "--set seed: should be a valid integer"),
        ("max_stepps=5", "--set max_stepps: no such setting. Did you mean max_steps?"),
    ],
    ids=["long", "deep", "unknown"],
)
def test_fault_of_an_override_is_one_message(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = commands.train(HEAD, tmp_path, capsys, override)
    assert code == 2
    assert message in err
    assert len(err) < 400


def test_description_may_begin_with_a_tilde(tmp_path: Path) -> None:
    from lora_scripts.config_file import make_config

    values = {"train_data_dir": "x", "base_model": "x", "output_dir": "x", "description": "~100 pictures"}
    assert make_config(values)[0].description == "~100 pictures"


@pytest.mark.fault(21)
def test_numbers_written_as_text_train(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = settings(learning_rate="1e-4", max_steps="1", lora_rank="2", lora_alpha="3.0")
    code, _, err = commands.train(values, tmp_path, capsys)
    assert code == 0, err
    assert '"learning_rate": 0.0001' in (tmp_path / "run" / "train.log").read_text("utf-8")


@pytest.mark.fault(21)
def test_rank_above_the_layers_names_the_largest_possible_one(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = commands.train(settings(lora_rank=512), tmp_path, capsys)
    assert code == 2
    assert err.startswith("lora_rank: 512 is more than unet.")
    assert "the largest possible rank here is 8. Lower lora_rank" in err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.fault(21)
def test_batch_above_the_data_set_is_refused_with_the_largest_that_can_be_filled(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = commands.train(settings(batch_size=32, max_steps=1), tmp_path, capsys)
    assert code == 2
    assert "batch_size: 32 is more than the 8 pictures of an epoch" in err
    assert "Set batch_size: 8 or less" in err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    code, _, err = commands.train(settings(batch_size=32, max_steps=1, repeats=4), tmp_path, capsys)
    assert code == 0, err


@pytest.mark.fault(21)
def test_default_batch_trains_a_folder_of_fewer_pictures(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(max_steps=1, exclude=["02.png", "03.png", "04.png", "05.png", "06.png", "07.png"])
    del values["batch_size"]
    code, out, err = commands.train(values, tmp_path, capsys)
    assert code == 0, err
    assert "batch_size: 4 x 1 is above the 2 pictures" in out
