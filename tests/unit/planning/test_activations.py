"""Traced activation bytes against what autograd really keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_scripts.adapters.lora import attach
from lora_scripts.config import RunConfig
from lora_scripts.families import family_class
from lora_scripts.families.protocol import Batch, ModelFamily
from lora_scripts.models.source import resolve_base_model
from lora_scripts.planning.activations import kept_bytes, trace_activations
from lora_scripts.training.draws import Draws


@pytest.fixture(params=[{}, {"train_text_encoder": True}, {"min_snr_gamma": 5.0}], ids=["unet", "text encoder", "snr"])
def family(request: pytest.FixtureRequest, tiny_sd_folder: Path) -> ModelFamily:
    config = RunConfig(train_data_dir=Path(), base_model=str(tiny_sd_folder), output_dir=Path(), **request.param)
    source = resolve_base_model(config.base_model)
    family = family_class(source.family).load(source, config, torch.device("cpu"), torch.float32)
    components = dict(family.components)
    if not config.train_text_encoder:
        components.pop("text_encoder")
    attach(components, {name: family.default_targets[name] for name in components}, rank=2, alpha=2)
    return family


def batch_of(family: ModelFamily, count: int) -> Batch:
    tensors = {}
    for encoder in family.encoders():
        inputs = [torch.zeros(3, 32, 32)] if encoder.reads == "image" else ["a cat"]
        tensors |= encoder.run(inputs)[0]
    stacked = {name: torch.stack([value] * count) for name, value in tensors.items()}
    return Batch(stacked, ["a cat"] * count, [str(i) for i in range(count)])


def real_bytes(family: ModelFamily, count: int) -> int:
    batch = batch_of(family, count)
    return kept_bytes(lambda: family.loss(batch, Draws(0)).total)[0]


def weight_bytes(family: ModelFamily) -> int:
    return sum(p.numel() * p.element_size() for module in family.components.values() for p in module.parameters())


def test_traced_bytes_per_example_are_those_autograd_keeps(family: ModelFamily) -> None:
    traced = trace_activations(
        lambda batch: family.loss(batch, Draws(0)).total, batch_of(family, 1), weight_bytes(family)
    )
    assert traced.per_example == pytest.approx(real_bytes(family, 5) - real_bytes(family, 4), rel=0.01)
    assert traced.of(6) <= real_bytes(family, 6)  # the real count holds the weights that take part, too
    assert traced.of(6) > real_bytes(family, 6) - weight_bytes(family)


def test_tracing_changes_neither_weights_nor_gradients(family: ModelFamily) -> None:
    parameters = {name: p for module in family.components.values() for name, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    trace_activations(lambda batch: family.loss(batch, Draws(0)).total, batch_of(family, 1), 0)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in parameters.items())
    assert all(type(p.data) is torch.Tensor for p in parameters.values())
    assert torch.isfinite(family.loss(batch_of(family, 1), Draws(0)).total)
