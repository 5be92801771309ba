"""Recorded passes: the numbers of plain ones to the bit, and plain ones wherever that is not certain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.trained_family import KINDS, family_with_adapter, picture_batch
from lora_scripts.adapters.lora import Adapter
from lora_scripts.families.protocol import Batch, Loss
from lora_scripts.models.packed_conv import PackedConvolutions
from lora_scripts.training.draws import Draws
from lora_scripts.training.recorded import RecordedPasses

DRAWS = Draws(3)


def recorded_passes(family: Any, adapter: Adapter, **more: Any) -> RecordedPasses:
    return RecordedPasses(lambda batch: family.loss(batch, DRAWS), lambda total: total, adapter.parameters(), **more)


def batches_of(family: Any, names: str, width: int = 8) -> list[Batch]:
    return [family.drawn(picture_batch(name, width), DRAWS) for name in names]


def assert_equal_to_plain(passes: RecordedPasses, family: Any, adapter: Adapter, batches: list[Batch]) -> None:
    """Losses and summed gradients of the passes, to the bit."""
    adapter.zero_grad()
    expected: list[Loss] = []
    for batch in batches:
        expected.append(family.loss(batch, DRAWS))
        expected[-1].total.backward()
    wanted = [None if p.grad is None else p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    for batch, loss in zip(batches, expected, strict=True):
        found = passes(batch)
        assert torch.equal(found.total, loss.total.detach())
        assert torch.equal(found.per_example, loss.per_example)
        assert loss.levels is not None
        assert found.levels is not None
        assert torch.equal(found.levels, loss.levels)
        assert found.count == loss.count
    for parameter, grad in zip(adapter.parameters(), wanted, strict=True):
        assert (parameter.grad is None) == (grad is None)
        if grad is not None:
            assert torch.equal(parameter.grad, grad)
            assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_those_of_plain_passes_to_the_bit(kind: str, tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path, kind)
    said: list[str] = []
    passes = recorded_passes(family, adapter, note=lambda text, level: said.append(f"{level}: {text}"))
    batches = [*batches_of(family, "abcde"), *batches_of(family, "fghij", width=12)]
    for _ in range(2):
        assert_equal_to_plain(passes, family, adapter, batches)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.1)
    assert passes.fault is None
    assert passes.num_proven == 2
    assert len(said) == 1
    assert said[0].startswith("info: Passes are repeated from a recording of ")


def test_repeated_passes_call_no_module(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    passes = recorded_passes(family, adapter)
    for batch in batches_of(family, "abc"):
        passes(batch)
    calls: list[object] = []
    family.components["unet"].register_forward_pre_hook(lambda module, inputs: calls.append(module))
    for batch in batches_of(family, "de"):
        passes(batch)
    assert not calls


def test_layers_have_prepared_their_weights_before_passes_are_recorded(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    packed = PackedConvolutions([family.components["unet"]])
    passes = recorded_passes(family, adapter, settled=lambda: packed.begun)
    for batch in batches_of(family, "abcd"):
        passes(batch)
    assert passes.num_proven == 0
    packed.begin()
    assert_equal_to_plain(passes, family, adapter, batches_of(family, "efghij"))
    assert passes.num_proven == 1


def test_a_pass_that_reads_more_than_its_tensors_stays_plain(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    factors = iter(range(1, 100))

    def forward(batch: Batch) -> Loss:
        loss: Loss = family.loss(batch, DRAWS)
        return replace(loss, total=loss.total * next(factors))

    passes = RecordedPasses(forward, lambda total: total, adapter.parameters())
    batch = batches_of(family, "a")[0]
    once = float(family.loss(batch, DRAWS).total.detach())
    totals = [float(passes(batch).total) for _ in range(5)]
    assert passes.fault == "a recorded pass gave other numbers than a plain one"
    assert totals == pytest.approx([once * factor for factor in (1, 2, 3, 4, 5)])


def test_a_pass_that_cannot_be_recorded_stays_plain(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)

    def forward(batch: Batch) -> Loss:
        loss: Loss = family.loss(batch, DRAWS)
        float(loss.total.detach())
        return loss

    said: list[tuple[str, str]] = []
    passes = RecordedPasses(forward, lambda total: total, adapter.parameters(), note=lambda *line: said.append(line))
    assert_equal_to_plain(passes, family, adapter, batches_of(family, "abcd"))
    assert passes.fault == "Python reads a number"
    assert said == [
        ("record_passes: switched off for this run (Python reads a number); it goes on with plain passes.", "warning")
    ]


def test_a_pass_that_goes_another_way_is_recorded_anew_a_few_times(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)

    def forward(batch: Batch) -> Loss:
        loss: Loss = family.loss(batch, DRAWS)
        factor = 1.0 if bool(batch.tensors["latents_mean"].sum() > 0) else 3.0
        return replace(loss, total=loss.total * factor)

    def signed(name: str, sign: int) -> Batch:
        batch = batches_of(family, name)[0]
        return batch.with_tensors({**batch.tensors, "latents_mean": sign * batch.tensors["latents_mean"].abs()})

    passes = RecordedPasses(forward, lambda total: total, adapter.parameters())
    for sign in (1, 1, 1, -1, -1, -1, -1, 1, 1, 1, -1, -1):
        batch = signed("a", sign)
        wanted = float(family.loss(batch, DRAWS).total.detach()) * (1.0 if sign > 0 else 3.0)
        assert float(passes(batch).total) == pytest.approx(wanted, rel=1e-6)
    assert passes.fault == "passes take one way now and then another"
