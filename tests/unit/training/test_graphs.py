"""Passes with buffers that stay where they are: the same numbers as plain ones, and nothing left over from the pass before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.trained_family import KINDS, family_with_adapter, picture_batch
from lora_scripts.adapters.lora import Adapter
from lora_scripts.families.protocol import Batch, Loss
from lora_scripts.training.draws import Draws
from lora_scripts.training.events import Events, Listener
from lora_scripts.training.graphs import GraphFaultError, GraphsOrPlain, StaticPasses

DRAWS = Draws(3)
CPU = torch.device("cpu")


def static_passes(family: Any, adapter: Adapter) -> StaticPasses:
    return StaticPasses(lambda batch: family.loss(batch, DRAWS), lambda total: total, adapter.parameters(), CPU)


def plain_pass(family: Any, batch: Batch) -> Loss:
    loss: Loss = family.loss(batch, DRAWS)
    loss.total.backward()
    return loss


def gradients(adapter: Adapter) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in adapter.parameters()]


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert [x is None for x in left] == [x is None for x in right]
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True) if a is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_those_of_plain_passes_to_the_bit(kind: str, tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path, kind)
    passes = static_passes(family, adapter)
    batches = [
        family.drawn(picture_batch(name, width), DRAWS) for name, width in (("a", 8), ("b", 12), ("c", 8), ("d", 12))
    ]
    for _ in range(2):  # the second step begins with gradients that were dropped
        adapter.zero_grad()
        expected = [plain_pass(family, batch) for batch in batches]
        wanted = gradients(adapter)
        adapter.zero_grad()
        found = [passes(batch) for batch in batches]
        assert_same([loss.total for loss in found], [loss.total.detach() for loss in expected])
        assert_same([loss.per_example for loss in found], [loss.per_example for loss in expected])
        assert_same([loss.levels for loss in found], [loss.levels for loss in expected])
        assert_same(gradients(adapter), wanted)
    assert passes.num_shapes == 2


def test_a_batch_is_read_from_its_buffer_and_the_callers_tensors_are_left_alone(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    passes = static_passes(family, adapter)
    first, second = (family.drawn(picture_batch(name), DRAWS) for name in "ab")
    before = {name: tensor.clone() for name, tensor in first.tensors.items()}
    one = passes(first)
    kept = one.total.clone(), one.per_example.clone()
    passes(second)
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in before.items())
    assert torch.equal(one.total, kept[0])
    assert torch.equal(one.per_example, kept[1])
    assert torch.equal(passes(first).total, one.total)


def test_gradients_are_added_to_the_same_tensors_in_every_step(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    passes = static_passes(family, adapter)
    batch = family.drawn(picture_batch("a"), DRAWS)
    passes(batch)
    places = [p.grad.data_ptr() for p in adapter.parameters() if p.grad is not None]
    adapter.zero_grad()
    passes(batch)
    assert [p.grad.data_ptr() for p in adapter.parameters() if p.grad is not None] == places


def test_gradients_of_plain_passes_in_between_are_kept(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    passes = static_passes(family, adapter)
    batches = [family.drawn(picture_batch(name), DRAWS) for name in "abc"]
    for batch in batches:
        plain_pass(family, batch)
    wanted = gradients(adapter)
    passes(batches[0])  # records
    adapter.zero_grad()
    plain_pass(family, batches[0])
    passes(batches[1])
    plain_pass(family, batches[2])
    assert_same(gradients(adapter), wanted)


def test_a_parameter_that_no_loss_reaches_keeps_no_gradient(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    layer = next(iter(adapter.layers.values()))
    layer.strength = 0.0
    static_passes(family, adapter)(family.drawn(picture_batch("a"), DRAWS))
    assert all(parameter.grad is None for parameter in layer.trained().values())
    assert sum(parameter.grad is None for parameter in adapter.parameters()) == len(layer.trained())


def test_forgotten_shapes_are_recorded_again_and_gradients_stay(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    passes = static_passes(family, adapter)
    batch = family.drawn(picture_batch("a"), DRAWS)
    plain_pass(family, batch)
    plain_pass(family, batch)
    wanted = gradients(adapter)
    adapter.zero_grad()
    passes(batch)
    passes.forget()
    assert passes.num_shapes == 0
    passes(batch)
    assert_same(gradients(adapter), wanted)


def test_a_shape_that_cannot_be_recorded_switches_recording_off_with_one_message(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)

    class Refusing(StaticPasses):
        def _recorded(self, batch: Batch) -> Any:
            raise GraphFaultError("no room")

    class Notes(Listener):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def note(self, text: str, level: str = "info") -> None:
            self.texts.append(text)

    notes = Notes()
    graphs = Refusing(lambda batch: family.loss(batch, DRAWS), lambda total: total, adapter.parameters(), CPU)
    passes = GraphsOrPlain(graphs, lambda batch: plain_pass(family, batch), Events([notes]))
    batch = family.drawn(picture_batch("a"), DRAWS)
    expected = plain_pass(family, batch).total
    wanted = gradients(adapter)
    adapter.zero_grad()
    assert torch.equal(passes(batch).total, expected)
    assert_same(gradients(adapter), wanted)
    passes(batch)
    assert notes.texts == ["cuda_graphs: switched off for this run (no room)."]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_passes_equal_plain_ones_on_a_gpu(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    device = torch.device("cuda")
    family.components["unet"].to(device)
    family._device = device
    family._objective._device = device
    family._objective.schedule = family._objective.schedule.to(device)
    passes = StaticPasses(lambda batch: family.loss(batch, DRAWS), lambda total: total, adapter.parameters(), device)
    for name, width in (("a", 8), ("b", 12), ("c", 8), ("d", 12)):
        batch = family.drawn(picture_batch(name, width), DRAWS)
        batch = batch.with_tensors({key: tensor.to(device) for key, tensor in batch.tensors.items()})
        adapter.zero_grad()
        expected, wanted = plain_pass(family, batch).total, gradients(adapter)
        adapter.zero_grad()
        torch.testing.assert_close(passes(batch).total, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-3, atol=1e-4)
