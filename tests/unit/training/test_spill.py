"""Memory that spills is told from the time of steps and the card's memory; a run then goes on in smaller passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.seen import train
from lora_scripts.families.sd15 import StableDiffusion15
from lora_scripts.training import loop, spill
from lora_scripts.training.checkpoint import load_checkpoint
from lora_scripts.training.spill import CardMemory, SpillDetector, card_memory

Settings = Callable[..., dict[str, Any]]
GB = 10**9
FULL, ROOMY = CardMemory(7_600_000_000, 8 * GB), CardMemory(5 * GB, 8 * GB)
PIXELS = 512 * 512
# Times of steps like those of a card of 8 GB that fills up: kernels are loaded in the first one, a picture is saved in the
# seventh, and from the eleventh on every step fetches tensors over the bus.
CLIFF = [4.1, 0.62, 0.61, 0.63, 0.61, 0.64, 1.90, 0.62, 0.61, 0.63, 7.8, 9.4, 8.9, 9.1, 10.2, 9.3]


def told_at(times: Sequence[float], memory: CardMemory, pixels: Sequence[int] | None = None) -> list[int]:
    """The steps, counted from 1, that complete a cliff."""
    detector = SpillDetector()
    sizes = pixels or [PIXELS] * len(times)
    steps = enumerate(zip(times, sizes, strict=True), start=1)
    return [step for step, (seconds, size) in steps if detector.add(seconds, size, memory)]


def test_cliff_is_told_once_five_steps_in_a_row_are_slow() -> None:
    assert told_at(CLIFF, FULL) == [15]


def test_cliff_that_goes_on_is_told_again_after_five_more_steps() -> None:
    assert told_at([0.6] * 5 + [9.0] * 10, FULL) == [10, 15]


def test_slow_steps_with_room_on_the_card_have_another_reason() -> None:
    assert told_at(CLIFF, ROOMY) == []


def test_single_slow_steps_are_no_cliff() -> None:
    assert told_at([0.6, 0.6, 0.6, 0.6, 0.6, 9.0, 9.0, 9.0, 9.0, 0.6] * 5, FULL) == []


def test_a_card_that_gets_warm_is_no_cliff() -> None:
    assert told_at([0.6 * 1.03**step for step in range(50)], FULL) == []


def test_larger_shapes_take_longer_without_being_a_cliff() -> None:
    times, pixels = [0.1] * 10 + [1.0] * 10, [PIXELS] * 10 + [9 * PIXELS] * 10
    assert told_at(times, FULL, pixels) == []


def test_spill_of_the_largest_shape_is_measured_by_the_others() -> None:
    times, pixels = [0.1] * 10 + [4.0] * 5, [PIXELS] * 10 + [2 * PIXELS] * 5
    assert told_at(times, FULL, pixels) == [15]


def test_memory_spills_on_windows_with_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card_memory(torch.device("cuda")) is None or spill.sys.platform == "win32"
    monkeypatch.setattr(spill.sys, "platform", "win32")
    assert card_memory(torch.device("cpu")) is None


class SlowCard:
    """A clock on which steps take 20 times as long from the seventh on, while passes hold more than one picture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.passes: list[int] = []
        plain = StableDiffusion15.loss

        def loss(family: Any, batch: Any, draws: Any) -> Any:
            self.passes.append(len(batch))
            self.now += len(batch) * (20.0 if len(self.passes) > 6 and len(batch) > 1 else 1.0)
            return plain(family, batch, draws)

        monkeypatch.setattr(StableDiffusion15, "loss", loss)
        monkeypatch.setattr(loop, "time", self)
        monkeypatch.setattr(spill, "card_memory", lambda device: FULL)

    def perf_counter(self) -> float:
        return self.now


def test_run_that_spills_goes_on_in_halves_with_the_same_result(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def values(name: str) -> dict[str, Any]:
        changes = {"buckets": False, "resolution": 64, "validation_pictures": 0, "log_steps": 100}
        run = tmp_path / name
        return settings(output_dir=str(run), batch_size=2, max_steps=14, save_steps=14, learning_rate=1e-3, **changes)

    train(values("whole"))
    with monkeypatch.context() as patched:
        card = SlowCard(patched)
        notes = train(values("spilled")).notes
    # Six quick steps and five slow ones before it is known, then three steps of two passes.
    assert card.passes == [2] * 11 + [1] * 6
    (warning,) = [note for note in notes if "times slower" in note]
    assert "The run goes on with 1; steps hold the same examples as before" in warning
    assert sum("Sysmem Fallback Policy" in note for note in notes) == 1
    assert load_checkpoint(tmp_path / "spilled" / "checkpoint-14").loop["micro_batch"] == 1
    whole, spilled = (load_file(tmp_path / name / "checkpoint-14/adapter.safetensors") for name in ("whole", "spilled"))
    assert all(torch.allclose(whole[key], spilled[key], rtol=1e-3, atol=1e-4) for key in whole)


def test_run_elsewhere_never_asks_for_the_cards_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: pytest.fail("asked"))
    train(settings(max_steps=2))
