"""Packed convolutions compute what the plain ones do, to rounding."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.trained_family import family_with_adapter, picture_batch
from lora_scripts import speeding
from lora_scripts.config import RunConfig
from lora_scripts.models.packed_conv import PackedConv2d, PackedConvolutions, packed_bytes
from lora_scripts.planning import budget
from lora_scripts.speeding import choose_speed
from lora_scripts.training.draws import Draws
from lora_scripts.training.events import Events


def plain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Kernels of 3x3 and 1x1, and one that halves the picture."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(16, 48, 3, padding=1),
        nn.Conv2d(48, 64, 3, stride=2, padding=1),
        nn.Conv2d(64, 32, 1, bias=False),
    )
    return nn.Sequential(*layers).to(dtype, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload, no-any-return]


def passed(model: nn.Module, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the input, of a pass over pictures [2,16,size,size]."""
    generator = torch.Generator().manual_seed(size)
    x = (
        torch.randn(2, 16, size, size, generator=generator)
        .to(dtype, memory_format=torch.channels_last)
        .requires_grad_()
    )
    out = model(x)
    (gradient,) = torch.autograd.grad(out, x, torch.randn(out.shape, generator=generator).to(dtype))
    return out.detach(), gradient


def is_packed(layer: nn.Module) -> bool:
    return isinstance(layer, PackedConv2d) and layer._forward_weight is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_and_gradients_are_those_of_the_plain_layers(dtype: torch.dtype) -> None:
    model, reference = plain(dtype), plain(dtype)
    assert packed_bytes([model]) == 2 * sum(layer.weight.nbytes for layer in model)
    convolutions = PackedConvolutions([model])
    for number, size in enumerate((16, 16, 24, 9, 16)):
        if number:
            convolutions.begin()
        ours, theirs = passed(model, size, dtype), passed(reference, size, dtype)
        torch.testing.assert_close(ours, theirs)
        assert ours[0].stride() == theirs[0].stride()
        assert all(is_packed(layer) == (number > 0) for layer in model)
    with torch.no_grad():
        x = torch.randn(1, 16, 8, 8, dtype=dtype)
        torch.testing.assert_close(model(x), reference(x))


def test_what_a_size_is_computed_to_does_not_depend_on_which_came_first() -> None:
    models = plain(), plain()
    for model, sizes in zip(models, ((16, 8), (8, 16)), strict=True):
        PackedConvolutions([model]).begin()
        for size in sizes:
            passed(model, size)
    for size in (8, 16, 12):
        ours, theirs = (passed(model, size) for model in models)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_pass_that_learns_nothing_packs_nothing() -> None:
    model = plain()
    PackedConvolutions([model]).begin()
    with torch.no_grad():
        model(torch.randn(1, 16, 8, 8))
    assert not any(map(is_packed, model))


def test_a_model_that_was_converted_or_copied_packs_anew() -> None:
    model, reference = plain(), plain(torch.bfloat16)
    PackedConvolutions([model]).begin()
    expected = passed(model, 8)
    again = copy.deepcopy(model)
    assert not any(map(is_packed, again))
    assert all(torch.equal(a, b) for a, b in zip(passed(again, 8), expected, strict=True))
    model.to(torch.bfloat16)
    assert not any(map(is_packed, model))
    torch.testing.assert_close(passed(model, 8, torch.bfloat16), passed(reference, 8, torch.bfloat16))


def test_layers_that_learn_or_are_of_another_form_stay_as_they_are() -> None:
    others = [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2).requires_grad_(False),
        nn.Conv2d(4, 4, 3).requires_grad_(False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular").requires_grad_(False),
        nn.Conv2d(4, 4, 3, padding="same").requires_grad_(False),
        nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float16).requires_grad_(False),
    ]
    PackedConvolutions(others)
    assert packed_bytes(others) == 0
    assert all(type(layer) is nn.Conv2d for layer in others)


@pytest.mark.parametrize(
    ("share", "limit", "packs"),
    [(4.1, None, True), (3.9, None, False), (4.1, 1.0, False)],
    ids=["room", "little", "limit"],
)
def test_a_run_packs_after_its_first_step_where_a_quarter_of_the_free_memory_is_enough(
    share: float, limit: float | None, packs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, adapter = family_with_adapter(tmp_path)
    taken = packed_bytes(family.components.values())
    monkeypatch.setattr(budget, "available_memory", lambda: int(share * taken))
    monkeypatch.setattr(speeding, "LITTLE_MEMORY", 0)
    data: Any = SimpleNamespace(examples=())
    config = RunConfig(train_data_dir=tmp_path, base_model="x", output_dir=tmp_path / "run", memory_limit_gb=limit)
    speed = choose_speed(config, family, data, torch.device("cpu"), 5, None, Events())
    batch, draws, unet = picture_batch("a"), Draws(0), family.components["unet"]
    gradients = []
    for step in range(2):
        speed.before_step(step)
        adapter.zero_grad()
        family.loss(batch, draws).total.backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
        assert any(map(is_packed, unet.modules())) == (packs and step > 0)
    torch.testing.assert_close(*gradients)
