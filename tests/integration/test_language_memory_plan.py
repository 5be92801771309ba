"""Settings on auto in runs on dialogues: what is chosen, and that the result is that of the written numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.seen import StopAfter, train

Settings = Callable[..., dict[str, Any]]
AUTO = {"batch_size": "auto", "effective_batch": 4, "gradient_checkpointing": "auto"}

# The tiny model takes 0.15 MB with its optimizer. A pass of four dialogues takes 0.75 MB at most, of two 0.51, of one 0.26;
# with checkpointing 0.44, 0.31 and 0.15. A tenth is added, and where a step is cut up, its gradients.
CUTS = {
    0.0011: "batch 4 in one pass, checkpointing off",
    0.0008: "batch 4 as 2 passes of 2, checkpointing off",
    0.0006: "batch 4 as 4 passes of 1, checkpointing off",
    0.0004: "batch 4 as 4 passes of 1, checkpointing on",
}
"""memory_limit_gb -> what is chosen."""


def weights(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / "run" / "adapter_model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def in_force(values: dict[str, Any]) -> dict[str, Any]:
    lines = (Path(values["output_dir"]) / "record.jsonl").read_text("utf-8").splitlines()
    settings = next(event for event in map(json.loads, lines) if event["event"] == "started")["settings"]
    return {key: settings[key] for key in ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing")}


@pytest.mark.parametrize("limit", list(CUTS))
def test_run_with_auto_is_the_run_with_the_chosen_numbers_written(
    limit: float, language_settings: Settings, tmp_path: Path
) -> None:
    def settings(folder: str, **changes: Any) -> dict[str, Any]:
        made = language_settings(
            max_steps=3, save_precision="fp32", lora_dropout=0.1, output_dir=str(tmp_path / folder / "run")
        )
        del made["batch_size"]
        return made | changes

    chosen = settings("auto", **AUTO, memory_limit_gb=limit)
    notes = train(chosen).notes
    told = [note for note in notes if note.startswith("Memory:")]
    assert len(told) == 1
    assert told[0].endswith(f"{CUTS[limit]}.")
    written = settings("written", **in_force(chosen))
    assert not [note for note in train(written).notes if note.startswith("Memory:")]
    assert equal(weights(chosen), weights(written))


def test_resumed_run_keeps_its_cut_when_memory_has_changed(language_settings: Settings, tmp_path: Path) -> None:
    def settings(folder: str, limit: float) -> dict[str, Any]:
        made = language_settings(save_precision="fp32", output_dir=str(tmp_path / folder / "run"))
        return made | AUTO | {"memory_limit_gb": limit}

    train(settings("broken", 0.0008), StopAfter(3))
    train(settings("broken", 1.0))
    train(settings("whole", 0.0008))
    assert equal(weights(settings("broken", 1.0)), weights(settings("whole", 1.0)))
