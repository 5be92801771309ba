"""Whatever operation of a checkpoint or an export is the last one, the newest whole state is found again."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import ExportError, TrainingError
from lora_scripts.export.peft_folder import write_peft_folder
from lora_scripts.export.reader import read_lora_file
from lora_scripts.export.writer import write_lora
from lora_scripts.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from reliability.faulty_files import Cut, FaultyFiles

KINDS = ["cut", "ENOSPC", "EIO"]


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        adapter={"unet.a.lora_A": torch.full((2, 3), float(step))},
        optimizer_tensors={"0.exp_avg": torch.full((2, 3), step / 7)},
        optimizer_state={"groups": [{"lr": 1e-4}]},
        identity={"lora_rank": 8},
        loop={"step": step},
    )


def export(path: Path, value: float) -> None:
    layer = LoRATensors(torch.full((2, 8), value), torch.full((8, 2), value), 3.0)
    write_lora(path, {"unet.down_blocks.0.attentions.0.proj_in": layer}, {"ss_output_name": "x"}, torch.float32)


def save_and_prune(folder: Path, step: int) -> None:
    save_checkpoint(folder, checkpoint(step), lambda place: export(place / f"run-{step}.safetensors", step))
    prune_checkpoints(folder, 2)


def prepared(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for step in (10, 20):
        save_and_prune(folder, step)
    return folder


def operations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    counting = FaultyFiles(prepared(folder))
    with counting.installed(monkeypatch):
        save_and_prune(folder, 30)
    return counting.done


@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_survives_a_fault_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    names = operations(tmp_path / "count", monkeypatch)
    assert {"write", "create", "fsync", "rename", "mkdir", "replace", "rmtree"} <= {name.split()[0] for name in names}
    committed = names.index("rename checkpoint-30.partial")
    for at, name in enumerate(names):
        folder = prepared(tmp_path / f"{kind}-{at}")
        layer = FaultyFiles(folder, at, kind)
        said = ""
        with layer.installed(monkeypatch):
            try:
                save_and_prune(folder, 30)
            except Cut:
                pass
            except TrainingError as error:
                said = str(error)
        if said:
            assert kind != "cut"
            assert "Older checkpoints are untouched" in said
            assert kind != "ENOSPC" or f"MB at {folder}" in said
        loaded, notes = newest_checkpoint(folder)
        # A folder that is there already need not be made: that fault harms nothing.
        harmless = kind != "cut" and not said
        expected = checkpoint(30 if at > committed or harmless else 20)
        assert loaded is not None
        assert (loaded.step, notes) == (expected.step, []), f"{kind} at {name}"
        assert torch.equal(loaded.adapter["unet.a.lora_A"], expected.adapter["unet.a.lora_A"])
        assert torch.equal(loaded.optimizer_tensors["0.exp_avg"], expected.optimizer_tensors["0.exp_avg"])
        whole = {path.name for path in list_checkpoints(folder)}
        assert {path.name for path in folder.iterdir()} == whole, f"{kind} at {name}: leftovers"
        save_and_prune(folder, 40)
        again, _ = newest_checkpoint(folder)
        assert again is not None
        assert again.step == 40


@pytest.mark.fault(2)
@pytest.mark.parametrize("kind", KINDS)
def test_export_is_the_old_file_or_the_new_one_after_a_fault_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    counting = FaultyFiles(tmp_path)
    with counting.installed(monkeypatch):
        export(tmp_path / "run.safetensors", 1.0)
    assert len(counting.done) >= 5
    old, new = load_file(tmp_path / "run.safetensors"), 2.0
    for at in range(len(counting.done)):
        folder = tmp_path / f"{kind}-{at}"
        folder.mkdir()
        export(folder / "run.safetensors", 1.0)
        expected_end = contextlib.suppress(Cut if kind == "cut" else ExportError)
        with FaultyFiles(folder, at, kind).installed(monkeypatch), expected_end:
            export(folder / "run.safetensors", new)
        left = load_file(folder / "run.safetensors")
        assert left.keys() == old.keys()
        assert {float(tensor.max()) for name, tensor in left.items() if not name.endswith("alpha")} in ({1.0}, {new})
        newest_checkpoint(folder)  # what a resumed run does first
        assert [path.name for path in folder.iterdir()] == ["run.safetensors"]


def export_folder(folder: Path, value: float) -> None:
    layer = LoRATensors(torch.full((2, 8), value), torch.full((8, 2), value), 3.0)
    weights = {"language_model.model.layers.0.mlp.up_proj": layer}
    write_peft_folder(folder, weights, "base", torch.float32, card=f"# {value}", replace=True)


def whole_value(folder: Path) -> float:
    [layer] = read_lora_file(folder).weights.values()
    assert (folder / "README.md").read_text() == f"# {layer.lora_A.max()}"
    return float(layer.lora_A.max())


@pytest.mark.fault(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_is_the_old_one_or_the_new_one_after_a_fault_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    export_folder(tmp_path / "count" / "run", 1.0)
    counting = FaultyFiles(tmp_path / "count")
    with counting.installed(monkeypatch):
        export_folder(tmp_path / "count" / "run", 2.0)
    assert {"write", "fsync", "rename", "mkdir"} <= {name.split()[0] for name in counting.done}
    for at, name in enumerate(counting.done):
        folder = tmp_path / f"{kind}-{at}" / "run"
        export_folder(folder, 1.0)
        expected_end = contextlib.suppress(Cut if kind == "cut" else ExportError)
        with FaultyFiles(folder.parent, at, kind).installed(monkeypatch), expected_end:
            export_folder(folder, 2.0)
        between = kind == "cut" and name == "rename run.partial"
        assert whole_value(folder.with_name("run.old") if between else folder) in (1.0, 2.0), f"{kind} at {name}"
        export_folder(folder, 3.0)
        assert whole_value(folder) == 3.0
        assert [path.name for path in folder.parent.iterdir()] == ["run"], f"{kind} at {name}: leftovers"
