"""Blocks that visit the device give the numbers of blocks that stay there, and no weight is anywhere it should not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.tiny_causal_lms import tiny_model, tokenizer
from helpers.trained_family import family_with_adapter, picture_batch, random_adapter
from lora_scripts.errors import ConfigError
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.families.protocol import Batch
from lora_scripts.models.block_swap import NUM_BUFFERS, BlockSwap, swap_blocks, swap_saving, swapped_places
from lora_scripts.models.quantised import stored_bytes
from lora_scripts.training.draws import Draws

CPU = torch.device("cpu")
DRAWS = Draws(3)
LAYERS = 5


def language_model(count: int, kind: str = "lora") -> tuple[CausalLanguageModel, Any]:
    model = tiny_model("llama", num_hidden_layers=LAYERS).requires_grad_(False)
    swap_blocks(model.base_model.layers, count, CPU)
    family = CausalLanguageModel(model, tokenizer())
    return family, random_adapter(family, family.default_targets, kind)


def texts(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(3, 250, (len(lengths), max(lengths)), generator=generator)
    targets = torch.tensor([[1, length - 1] for length in lengths])
    filled = {"tokens": list(lengths), "targets": [2] * len(lengths)}
    return Batch({"tokens": tokens, "targets": targets}, [], [str(n) for n in lengths], filled=filled)


def numbers(family: Any, adapter: Any, batches: list[Batch]) -> list[torch.Tensor]:
    """Losses and gradients of some passes, each after a measurement."""
    adapter.zero_grad()
    found = []
    for batch in batches:
        with torch.no_grad():
            found.append(family.loss(batches[0], DRAWS).total)
        loss = family.loss(batch, DRAWS).total
        loss.backward()
        found.append(loss.detach())
    return [*found, *(parameter.grad.clone() for parameter in adapter.parameters())]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, LAYERS])
def test_swapped_layers_give_losses_and_gradients_to_the_bit(count: int, checkpointing: bool, kind: str) -> None:
    batches = [texts(7, 12, 3), texts(5, 9)]
    found = []
    for swapped in (0, count):
        family, adapter = language_model(swapped, kind)
        family.set_checkpointing(checkpointing)
        found.append(numbers(family, adapter, batches))
    assert_same(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_swapped_unet_gives_losses_and_gradients_to_the_bit(checkpointing: bool, tmp_path: Path) -> None:
    found = []
    for count in (0, 3):
        family, adapter = family_with_adapter(tmp_path / str(count), block_swap=count)
        family.set_checkpointing(checkpointing)
        batches = [family.drawn(picture_batch(name, width), DRAWS) for name, width in (("a", 8), ("b", 12))]
        found.append(numbers(family, adapter, batches))
    assert_same(*found)


def test_the_backward_pass_fetches_the_blocks_again_last_ones_first() -> None:
    family, adapter = language_model(LAYERS)
    expected = numbers(family, adapter, [texts(7, 12)])
    fetched: list[int] = []
    bring = BlockSwap._bring

    def counted(self: BlockSwap, number: int) -> None:
        before = list(self._held)
        bring(self, number)
        if before != self._held:
            fetched.append(number)

    BlockSwap._bring = counted  # type: ignore[method-assign]
    try:
        adapter.zero_grad()
        loss = family.loss(texts(7, 12), DRAWS).total
        fetched.clear()
        loss.backward()
    finally:
        BlockSwap._bring = bring  # type: ignore[method-assign]
    assert fetched == list(range(LAYERS - NUM_BUFFERS - 1, -1, -1)), "two are still there, the others come back in turn"
    assert torch.equal(loss.detach(), expected[-len(adapter.parameters()) - 1])


def test_swapped_weights_take_two_buffers_on_the_device() -> None:
    model = tiny_model("llama", num_hidden_layers=LAYERS).requires_grad_(False)
    layers = list(model.base_model.layers)
    whole = stored_bytes(model)
    saving = swap_saving(layers, 4)
    swap_blocks(layers, 4, CPU)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    rounding = 256 * sum(1 for _ in model.parameters())
    assert abs(sum(storages.values()) + buffers - (whole - saving)) <= rounding
    assert saving > 0


def test_blocks_that_are_swapped_are_spread_over_the_model() -> None:
    assert swapped_places(10, 5) == [1, 3, 5, 7, 9]
    assert swapped_places(6, 6) == [0, 1, 2, 3, 4, 5]
    assert swapped_places(7, 1) == [3]
    with pytest.raises(ConfigError, match="block_swap: 8: this model has 7 blocks"):
        swapped_places(7, 8)


def test_moving_the_model_leaves_swapped_weights_where_they_are() -> None:
    model = tiny_model("llama", num_hidden_layers=2).requires_grad_(False)
    swap_blocks(model.base_model.layers, 2, CPU)
    places = [p.data_ptr() for p in model.parameters()]
    nn.Module.to(model, CPU)
    assert [p.data_ptr() for p in model.parameters()] == places
