"""Frozen group normalisation computes what torch's does, and rounds bfloat16 less."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lora_scripts.models.frozen_norm import FEW_PIXELS, FrozenGroupNorm, freeze_group_norms


def norm(channels: int, groups: int) -> nn.GroupNorm:
    torch.manual_seed(0)
    layer = nn.GroupNorm(groups, channels)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.bfloat16()


def passed(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


@pytest.mark.parametrize("size", [8, 40], ids=["few pixels", "many pixels"])
def test_in_bfloat16_output_and_gradient_are_those_of_float64_to_one_rounding(size: int) -> None:
    assert (size**2 < FEW_PIXELS) == (size == 8)
    layer = norm(24, 6)
    exact = copy.deepcopy(layer).double()
    freeze_group_norms(layer)
    x = (3 * torch.randn(2, 24, size, size) + 1).bfloat16().contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    for ours, reference in zip(passed(layer, x, grad), passed(exact, x.double(), grad.double()), strict=True):
        assert ours.dtype is torch.bfloat16
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert float((ours.double() - reference).norm()) < 2**-9 * float(reference.norm())


def test_in_float32_it_is_torchs_own() -> None:
    layer = norm(24, 6).float()
    plain = copy.deepcopy(layer)
    freeze_group_norms(layer)
    x, grad = torch.randn(2, 24, 8, 8), torch.randn(2, 24, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(passed(layer, x, grad), passed(plain, x, grad), strict=True))


def test_names_and_weights_stay_and_nothing_learns() -> None:
    model = nn.Sequential(norm(8, 2), nn.GroupNorm(2, 8, affine=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze_group_norms(model)
    assert [type(layer) for layer in model] == [FrozenGroupNorm, nn.GroupNorm]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
