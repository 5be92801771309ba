"""Frozen linear layers compute what torch's own do, with the input's gradient, whichever library multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_scripts.models.frozen_linear import FEWEST_MULTIPLICATIONS, FrozenLinear, freeze_linears, product

SHAPES = {"large": (3, 70, 96, 160), "few rows": (1, 3, 32, 48), "no rows": (1, 0, 96, 160)}
"""Batch, rows, in, out: above the size from which oneDNN multiplies, and below."""


ONEDNN = torch.ops.mkldnn._linear_pointwise.default


class CalledOperations(TorchDispatchMode):
    """Which operations run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func)
        return func(*args, **(kwargs or {}))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_shapes_lie_on_both_sides_of_the_border() -> None:
    sizes = [batch * rows * width * out for batch, rows, width, out in SHAPES.values()]
    assert sizes[0] > FEWEST_MULTIPLICATIONS > sizes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_and_gradient_are_those_of_torch(shape: str, bias: bool, dtype: torch.dtype) -> None:
    batch, rows, width, out = SHAPES[shape]
    plain = nn.Linear(width, out, bias=bias).to(dtype).requires_grad_(False)
    x, grad = numbers(batch, rows, width, dtype=dtype), numbers(batch, rows, out, dtype=dtype)
    expected_x = x.clone().requires_grad_()
    expected = plain(expected_x)
    expected.backward(grad)
    freeze_linears(plain)
    assert type(plain) is FrozenLinear
    ours_x = x.clone().requires_grad_()
    ours = plain(ours_x)
    ours.backward(grad)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours_x.grad, expected_x.grad)
    torch.testing.assert_close(plain(x), expected.detach())


@pytest.mark.parametrize("strides", ["transposed", "a part of the columns", "every second row"])
def test_weight_may_have_any_strides(strides: str) -> None:
    wide = numbers(320, 192)
    weight = {"transposed": wide.t(), "a part of the columns": wide[:, :100], "every second row": wide[::2]}[strides]
    x = numbers(200, weight.shape[1])
    torch.testing.assert_close(product(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_gradient_of_a_weight_that_trains_is_not_lost() -> None:
    weight, x = numbers(160, 96).requires_grad_(), numbers(200, 96)
    product(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(160, 96))
    layer = nn.Linear(96, 160)
    freeze_linears(layer)
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_only_plain_layers_change_and_everything_saved_stays() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(8, 8), Doubling(8, 8), nn.Conv2d(8, 8, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    freeze_linears(model)
    assert [type(layer) for layer in model] == [FrozenLinear, Doubling, nn.Conv2d]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_mixed_precision_of_a_caller_holds() -> None:
    layer = nn.Linear(96, 160)
    freeze_linears(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(numbers(200, 96)).dtype is torch.bfloat16


def test_memory_can_be_foreseen_without_weights() -> None:
    with FakeTensorMode():
        layer = nn.Linear(96, 160)
        freeze_linears(layer)
        x = torch.empty(200, 96, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == (200, 96)


def test_compiled_code_computes_the_same() -> None:
    layer = nn.Linear(96, 160)
    freeze_linears(layer)
    x = numbers(200, 96).requires_grad_()
    expected = layer(x)
    torch.testing.assert_close(
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("gaps", ["a part of the columns", "one column of several heads", "one row over and over"])
def test_matrix_with_gaps_never_reaches_onednn(gaps: str) -> None:
    """It would compute it with its reference code, which is right, and hundreds of times slower."""
    weight = {
        "a part of the columns": numbers(160, 192)[:, :96],
        "one column of several heads": numbers(160, 4, 96)[:, 1],
        "one row over and over": numbers(1, 96).expand(160, 96),
    }[gaps]
    with CalledOperations() as called:
        product(numbers(200, 96), weight)
        assert ONEDNN not in called.operations
        product(numbers(200, 96), weight.contiguous())
        product(numbers(200, 160), weight.contiguous().t())
    assert called.operations.count(ONEDNN) == 2
