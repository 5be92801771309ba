"""Whole runs on a language model in 4 and 8 bits: what they leave, and how they resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import train as train_by_command
from helpers.seen import StopAfter, train
from helpers.tiny_causal_lms import logits_with, probe, save_tiny
from lora_scripts.export.reader import read_lora_file

pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")
Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A run on sixteen dialogues, into a folder of the given name."""
    base = save_tiny(tmp_path / "base")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"input": f"{n} and {n}?", "output": f"{2 * n}, my friend"} for n in range(16)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return {
            "task_type": "text-generation",
            "train_data_dir": str(data),
            "base_model": str(base),
            "output_dir": str(tmp_path / name / "run"),
            "device": "cpu",
            "mixed_precision": "fp32",
            "save_precision": "fp32",
            "batch_size": 4,
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "lora_rank": 2,
            "lora_alpha": 3,
            "sample_every": 0,
            "validation_dialogues": 0,
            **changes,
        }

    return make


def finished(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / "run" / "adapter_model.safetensors")


def test_adapter_trained_on_nf4_fits_the_model_in_full(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    values = settings("a", quantization="nf4", max_steps=20, save_steps=20)
    code, out, error = train_by_command(values, tmp_path, capsys)
    assert code == 0, error
    assert "held in nf4, head and embeddings not" in out
    assert "effect compared: the file changes the model's output as the training did" in out
    folder = Path(values["output_dir"]) / "run"
    assert "The base was held in nf4 meanwhile" in (folder / "README.md").read_text("utf-8")
    about = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert about["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained = logits_with(base, read_lora_file(folder).weights)
    assert (trained - base(probe()).logits).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(base, folder)(probe()).logits, trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": "nf4"},
        {"quantization": "nf4", "mixed_precision": "bf16", "adapter": "dora"},
        {"quantization": "int8", "gradient_checkpointing": True},
    ],
    ids=["nf4", "nf4, bf16, dora", "int8, checkpointing"],
)
def test_run_that_was_stopped_ends_in_the_same_bits(settings: Settings, changes: dict[str, Any]) -> None:
    # Answers are written in between: in the model's way for that, which must leave training as it was.
    more = {"lora_dropout": 0.2, "sample_every": 1, "sample_prompts": ["3 and 3?"], "sample_tokens": 3, **changes}
    whole, broken, silent = settings("a", **more), settings("b", **more), settings("c", **more | {"sample_every": 4})
    train(whole)
    for step in (1, 3):
        train(broken, StopAfter(step))
    train(broken)
    train(silent)
    for other in (broken, silent):
        theirs = finished(other)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in finished(whole).items())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_memory_of_a_step_is_predicted(settings: Settings, quantization: str) -> None:
    seen = train(settings("a", quantization=quantization, batch_size="auto", effective_batch=4))
    assert any("Memory: predicted" in note and "batch 4 in one pass, checkpointing off" in note for note in seen.notes)


def test_run_does_not_go_on_in_another_quantization(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings("a", quantization="nf4"), StopAfter(2))
    code, _, error = train_by_command(settings("a", quantization="int8"), tmp_path, capsys)
    assert code == 2
    assert "quantization" in error
