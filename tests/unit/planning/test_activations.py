"""Memory predicted with fake tensors against what the allocator really hands out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.allocator import allocated_peak
from lora_scripts.adapters.lora import Adapter, attach
from lora_scripts.config import RunConfig
from lora_scripts.families import family_class
from lora_scripts.families.protocol import Batch, ModelFamily
from lora_scripts.models.source import resolve_base_model
from lora_scripts.planning.activations import predicted_peak
from lora_scripts.training.draws import Draws

MARGIN = 0.01
KERNEL_BYTES = 500_000
"""What kernels of these small models take for themselves for a moment, which no tensor shows."""


def load(base_model: str, adapter: dict[str, Any] | None = None, **settings: object) -> tuple[ModelFamily, Adapter]:
    config = RunConfig(train_data_dir=Path(), base_model=base_model, output_dir=Path(), **settings)
    source = resolve_base_model(config.base_model)
    family = family_class(source.family).load(source, config, torch.device("cpu"), torch.float32)
    family._parts.read_rest()  # encoders, which a run reads when there is something to encode
    components = dict(family.components)
    if not config.train_text_encoder:
        components.pop("text_encoder")
    targets = {name: family.default_targets[name] for name in components}
    return family, attach(components, targets, rank=2, alpha=2, **(adapter or {}))


@pytest.fixture(
    params=[
        {},
        {"train_text_encoder": True},
        {"min_snr_gamma": 5.0},
        {"prior_preservation_weight": 1.0, "prior_prompt": "a cat"},
        {"pyramid_noise_iterations": 6, "input_perturbation": 0.1, "loss_type": "huber"},
        {"adapter": {"kind": "dora"}},
        {"adapter": {"init": "pissa"}},
    ],
    ids=["unet", "text encoder", "snr", "prior", "noises", "dora", "pissa"],
)
def model(request: pytest.FixtureRequest, tiny_sd_folder: Path) -> tuple[ModelFamily, Adapter]:
    return load(str(tiny_sd_folder), **request.param)


def batch_of(family: ModelFamily, count: int, size: int = 256) -> Batch:
    tensors = {}
    for encoder in family.encoders():
        inputs = [torch.zeros(3, size, size)] if encoder.reads == "image" else ["a cat"]
        tensors |= encoder.run(inputs)[0]
    stacked = {name: torch.stack([value] * count) for name, value in tensors.items()}
    return Batch(stacked, ["a cat"] * count, [str(i) for i in range(count)])


def predicted(family: ModelFamily, adapter: Adapter, count: int, size: int = 256) -> int:
    example = batch_of(family, 1, size)
    return predicted_peak(lambda batch: family.loss(batch, Draws(0)).total, example, count, list(adapter.parameters()))


def allocated(family: ModelFamily, adapter: Adapter, count: int, size: int = 256) -> int:
    """The most bytes that the allocator had handed out during a real forward and backward pass."""
    batch = batch_of(family, count, size)
    family.loss(batch, Draws(0)).total.backward()  # what is made once, such as a schedule's tables, is made here
    adapter.zero_grad()
    peak = allocated_peak(lambda: family.loss(batch, Draws(0)).total.backward())
    adapter.zero_grad()
    return peak


def close(predicted: int, allocated: int) -> bool:
    """The prediction is at most a little below the truth and never above it."""
    return predicted <= allocated <= (1 + MARGIN) * predicted + KERNEL_BYTES


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("count", [2, 6])
def test_predicted_peak_is_what_the_allocator_hands_out(
    model: tuple[ModelFamily, Adapter], count: int, checkpointing: bool
) -> None:
    family, adapter = model
    family.set_checkpointing(checkpointing)
    assert close(predicted(family, adapter, count), allocated(family, adapter, count))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_predicted_peak_of_the_built_in_model_is_what_the_allocator_hands_out(checkpointing: bool) -> None:
    family, adapter = load("builtin:mini-sd")
    family.set_checkpointing(checkpointing)
    assert close(predicted(family, adapter, 3, 128), allocated(family, adapter, 3, 128))


def test_checkpointing_is_predicted_to_save_memory(tiny_sd_folder: Path) -> None:
    family, adapter = load(str(tiny_sd_folder))
    plain = predicted(family, adapter, 16)
    family.set_checkpointing(True)
    assert predicted(family, adapter, 16) < 0.7 * plain


def test_prediction_changes_neither_weights_nor_gradients_nor_random_state(
    model: tuple[ModelFamily, Adapter],
) -> None:
    family, adapter = model
    parameters = {name: p for module in family.components.values() for name, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    random_state = torch.get_rng_state()
    predicted(family, adapter, 2)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in parameters.items())
    assert all(type(p.data) is torch.Tensor for p in parameters.values())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.isfinite(family.loss(batch_of(family, 1), Draws(0)).total)


def test_memory_given_back_no_longer_counts() -> None:
    from lora_scripts.planning.live_bytes import LiveBytes

    weight = torch.ones(1000)
    live = LiveBytes()
    with live:
        first = torch.zeros(1000)
        assert live.now == 4000
        del first
        assert live.now == 0
        second = weight * 2  # new memory
        view = second[:10]
        weight.add_(1)  # none
        weight.view(10, 100)  # none, and the weight itself was there before
        del second
        assert live.now == live.peak == 4000  # the view keeps all of it alive
        del view
    assert live.now == 0
