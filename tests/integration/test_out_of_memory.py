"""Memory that runs out in the middle of a run: smaller passes, the same steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.seen import train
from lora_scripts.errors import TrainingError
from lora_scripts.families.sd15 import StableDiffusion15
from lora_scripts.training.checkpoint import load_checkpoint

Settings = Callable[..., dict[str, Any]]
OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: not enough memory: you tried ..."
    ),
}


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int, error: RuntimeError) -> list[int]:
    """From the third pass on, more than `most` pictures at once do not fit; the sizes of all passes."""
    plain, sizes = StableDiffusion15.loss, []

    def loss(self: Any, batch: Any, draws: Any) -> Any:
        sizes.append(len(batch))
        if len(sizes) > 2 and len(batch) > most:
            raise error
        return plain(self, batch, draws)

    monkeypatch.setattr(StableDiffusion15, "loss", loss)
    return sizes


@pytest.mark.fault(13)
@pytest.mark.parametrize("kind", list(OUT_OF_MEMORY))
def test_passes_get_smaller_and_the_result_stays(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def values(name: str) -> dict[str, Any]:
        changes = {"buckets": False, "resolution": 64, "validation_pictures": 0}
        return settings(output_dir=str(tmp_path / name), batch_size=4, max_steps=4, save_steps=4, **changes)

    train(values("whole"))
    with monkeypatch.context() as patched:
        sizes = limit_memory(patched, 1, OUT_OF_MEMORY[kind])
        notes = train(values("cut")).notes
    assert sizes[:5] == [4, 4, 4, 2, 1]
    assert set(sizes[5:]) == {1}
    assert any("Out of memory with 4 examples at once. The run goes on with 2" in note for note in notes)
    whole, cut = (load_file(tmp_path / name / "checkpoint-4" / "adapter.safetensors") for name in ("whole", "cut"))
    assert all(torch.allclose(whole[key], cut[key], rtol=1e-3, atol=1e-4) for key in whole)
    assert any(value.any() for key, value in cut.items() if key.endswith("lora_B"))
    # A step that was begun again has counted its pictures once.
    checkpoints = [load_checkpoint(tmp_path / name / "checkpoint-4") for name in ("whole", "cut")]
    uses = [checkpoint.loop["picture_losses"]["counts"] for checkpoint in checkpoints if checkpoint is not None]
    assert len(uses) == 2
    assert uses[0] == uses[1]


@pytest.mark.fault(13)
def test_a_resumed_run_begins_with_the_size_that_fitted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_scripts.training.checkpoint import load_checkpoint

    limit_memory(monkeypatch, 1, OUT_OF_MEMORY["GPU"])
    train(settings(max_steps=6, save_steps=6))
    assert load_checkpoint(tmp_path / "run" / "checkpoint-6").loop["micro_batch"] == 1


@pytest.mark.fault(13)
def test_a_run_ends_with_advice_when_a_single_picture_does_not_fit(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 0, OUT_OF_MEMORY["GPU"])
    with pytest.raises(TrainingError, match=r"Out of memory with a single example .*gradient_checkpointing: true"):
        train(settings(save_steps=1))
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_other_errors_are_not_taken_for_a_lack_of_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(settings())
