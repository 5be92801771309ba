"""Checkpoint folders: whole or not at all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_scripts.errors import ResumeError, TrainingError
from lora_scripts.training.checkpoint import (
    Checkpoint,
    differences,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    refuse_differences,
    save_checkpoint,
)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        adapter={"unet.a.lora_A": torch.full((2, 3), float(step))},
        optimizer_tensors={"0.exp_avg": torch.randn(2, 3)},
        optimizer_state={"groups": [{"lr": 1e-4}]},
        identity={"lora_rank": 8, "pictures and captions": {"a.png": "x"}},
        loop={"step": step},
    )


def test_saved_state_comes_back_whole(tmp_path: Path) -> None:
    saved = checkpoint(10)
    folder = save_checkpoint(tmp_path, saved, lambda place: (place / "style-10.safetensors").write_bytes(b"lora"))
    assert folder == tmp_path / "checkpoint-10"
    assert (folder / "style-10.safetensors").read_bytes() == b"lora"
    loaded, notes = newest_checkpoint(tmp_path)
    assert loaded is not None
    assert notes == []
    assert (loaded.step, loaded.identity, loaded.loop) == (10, saved.identity, saved.loop)
    assert torch.equal(loaded.optimizer_tensors["0.exp_avg"], saved.optimizer_tensors["0.exp_avg"])


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "zero tail", "remove"])
def test_damaged_newest_is_named_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path, checkpoint(10))
    path = save_checkpoint(tmp_path, checkpoint(20)) / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    if damage == "remove":
        path.unlink()
    else:
        half = len(raw) // 2
        path.write_bytes({"flip": raw, "cut": raw[:half], "zero tail": raw[:half] + bytes(len(raw) - half)}[damage])
    loaded, notes = newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 10
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint-20: ")


@pytest.mark.fault(9)
@pytest.mark.parametrize("part", ["adapter", "optimizer_tensors"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path, part: str, bad: float) -> None:
    save_checkpoint(tmp_path, checkpoint(10))
    lost = replace(checkpoint(20), **{part: {"unet.a.lora_A": torch.tensor([1.0, bad])}})
    with pytest.raises(TrainingError, match=r"checkpoint-20 was not written: unet\.a\.lora_A holds numbers"):
        save_checkpoint(tmp_path, lost)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.fault(2)
def test_half_written_folder_is_ignored_and_swept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(10))
    half = tmp_path / "checkpoint-20.partial"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    loaded, _ = newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 10
    assert not half.exists()


@pytest.mark.fault(3)
def test_failure_while_writing_leaves_the_older_ones(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(10))

    def full_disk(folder: Path) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(TrainingError, match=r"a checkpoint needs .* MB at .*Older checkpoints are untouched"):
        save_checkpoint(tmp_path, checkpoint(20), full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_damaged_one_of_the_same_step_is_put_aside(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, checkpoint(10)) / "state.json").write_text("{}")
    save_checkpoint(tmp_path, checkpoint(10))
    loaded, _ = newest_checkpoint(tmp_path)
    assert loaded is not None
    assert (tmp_path / "checkpoint-10.damaged" / "state.json").read_text() == "{}"


def test_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = save_checkpoint(tmp_path / "other", checkpoint(99))
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-99").symlink_to(elsewhere, target_is_directory=True)
    assert list_checkpoints(run) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, checkpoint(step))
    prune_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_the_last_one_that_verifies_is_never_removed(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        save_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "checkpoint-20" / "state.json").write_text("{}")
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"]


@pytest.mark.fault(27)
def test_difference_is_shown_with_both_ways_on(tmp_path: Path) -> None:
    now = {"lora_rank": 16, "pictures and captions": {"a.png": "x", "b.png": "y"}}
    assert differences(checkpoint(1).identity, now) == [
        "  lora_rank: was 8, is now 16",
        '  b.png: was null, is now "y"',
    ]
    with pytest.raises(ResumeError, match=r"(?s)lora_rank: was 8.*another output_dir.*init_lora_weights: .*style-10"):
        refuse_differences(checkpoint(1).identity, now, tmp_path, tmp_path / "style-10.safetensors")
