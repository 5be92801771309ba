"""Products of frozen weights in 8 bits against the formulas written out, and against plain products within what rounding allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.trained_family import family_with_adapter, picture_batch
from lora_scripts.adapters.kinds import AdapterForm
from lora_scripts.adapters.lora import attach
from lora_scripts.models import low_bit, low_bit_layers
from lora_scripts.models.low_bit import (
    NUMBERS_AT_ONCE,
    LowBit,
    low_bit_bytes,
    low_bit_linear,
    low_bit_product,
    low_bit_weight,
    transposed_low_bit_product,
)
from lora_scripts.models.low_bit_layers import LowBitLayers, low_bit_copies, low_bit_of
from lora_scripts.training.draws import Draws

pytest.importorskip("torchao", reason="products in 8 bits need torchao")

KINDS: tuple[LowBit, ...] = ("int8", "fp8")
OUT, IN, ROWS = 48, 32, 21


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose rows differ in size, as those of activations do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 1, shape[0])[torch.randperm(shape[0], generator=generator)]
    return torch.randn(*shape, generator=generator) * sizes[:, None]


def rounded(rows: Tensor, kind: LowBit) -> Tensor:
    """s Q(rows) with one scale for each row, in float64."""
    rows = rows.double()
    largest = rows.abs().amax(1, keepdim=True)
    if kind == "int8":
        return (rows / (largest / 127)).round() * (largest / 127)
    return (rows * (448 / largest)).float().to(torch.float8_e4m3fn).double() * (largest / 448)


def rounding_error(rows: Tensor, kind: LowBit) -> Tensor:
    """The most that each number may have been moved: half a step of 127, or of four bits above the smallest ones."""
    rows = rows.double()
    largest = rows.abs().amax(1, keepdim=True)
    if kind == "int8":
        return (largest / 127 / 2).expand_as(rows) * (1 + 1e-4)
    return torch.maximum(rows.abs() * 2**-4, largest / 448 * 2**-10) * (1 + 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_both_products_are_the_formula(kind: LowBit) -> None:
    x, w, grad = drawn(ROWS, IN), drawn(OUT, IN, seed=1), drawn(ROWS, OUT, seed=2)
    weight = low_bit_weight(w, kind)
    q_w = rounded(w, kind)
    torch.testing.assert_close(low_bit_product(x, weight).double(), rounded(x, kind) @ q_w.T, rtol=1e-4, atol=1e-6)
    scales = w.double().abs().amax(1) / (127 if kind == "int8" else 448)
    expected = rounded(grad.double() * scales, kind) @ (q_w / scales[:, None])
    torch.testing.assert_close(transposed_low_bit_product(grad, weight).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_both_products_are_the_plain_ones_within_what_rounding_allows(kind: LowBit) -> None:
    x, w, grad = drawn(ROWS, IN), drawn(OUT, IN, seed=1), drawn(ROWS, OUT, seed=2)
    weight = low_bit_weight(w, kind)
    dx, dw = rounding_error(x, kind), rounding_error(w, kind)
    wide_x, wide_w, wide_grad = x.double(), w.double(), grad.double()
    allowed = wide_x.abs() @ dw.T + dx @ wide_w.abs().T + dx @ dw.T
    error = (low_bit_product(x, weight).double() - wide_x @ wide_w.T).abs()
    assert bool((error <= allowed + 1e-6).all())
    assert bool((error > 0).any()), "nothing was rounded"
    scales = wide_w.abs().amax(1) / (127 if kind == "int8" else 448)
    dg = rounding_error(wide_grad * scales, kind) / scales
    allowed = wide_grad.abs() @ dw + dg @ wide_w.abs() + dg @ dw
    assert bool(
        ((transposed_low_bit_product(grad, weight).double() - wide_grad @ wide_w).abs() <= allowed + 1e-6).all()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_input_is_that_product_and_the_weight_gets_none(kind: LowBit) -> None:
    x, w, grad = drawn(ROWS, IN).view(3, 7, IN).requires_grad_(), drawn(OUT, IN, seed=1), drawn(ROWS, OUT, seed=2)
    weight, bias = low_bit_weight(w, kind), torch.randn(OUT)
    out = low_bit_linear(x, weight, bias)
    assert torch.equal(out, low_bit_product(x.detach().view(-1, IN), weight).view(3, 7, OUT) + bias)
    out.backward(grad.view(3, 7, OUT))
    assert x.grad is not None
    assert torch.equal(x.grad.view(-1, IN), transposed_low_bit_product(grad, weight))
    assert not any(part.requires_grad for part in weight if isinstance(part, Tensor))


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_depends_on_those_beside_it_however_many_there_are(kind: LowBit) -> None:
    weight = low_bit_weight(drawn(OUT, IN, seed=1), kind)
    at_once = NUMBERS_AT_ONCE // OUT
    x, grad = drawn(2 * at_once + 5, IN), drawn(2 * at_once + 5, OUT)
    together = low_bit_product(x, weight), transposed_low_bit_product(grad, weight)
    for place in (0, at_once, 2 * at_once + 4):
        alone = (
            low_bit_product(x[place : place + 1], weight),
            transposed_low_bit_product(grad[place : place + 1], weight),
        )
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[place], rtol=1e-5, atol=1e-5 * float(all_[place].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_half_precision_hardly_holds_are_not_lost(kind: LowBit) -> None:
    w = 1e-2 * drawn(OUT, IN, seed=1)
    grad = 1e-6 * torch.randn(ROWS, OUT, generator=torch.Generator().manual_seed(2))
    found = transposed_low_bit_product(grad.half(), low_bit_weight(w.half(), kind)).float()
    expected = (grad.half().float() @ w.half().float()).half().float()
    assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_gives_zeros(kind: LowBit) -> None:
    weight = low_bit_weight(torch.cat([torch.zeros(1, IN), drawn(OUT - 1, IN)]), kind)
    out = low_bit_product(torch.cat([torch.zeros(1, IN), drawn(2, IN)]), weight)
    assert not out[0].any()
    assert not out[:, 0].any()
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_hidden(kind: LowBit, bad: float) -> None:
    x = drawn(3, IN)
    x[1, 4] = bad
    out = low_bit_product(x, low_bit_weight(drawn(OUT, IN, seed=1), kind))
    assert not bool(out[1].isfinite().all())
    assert bool(out[[0, 2]].isfinite().all())


class Block(nn.Module):
    """A linear layer and a 1x1 convolution between others that stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(IN)
        self.up = nn.Linear(IN, OUT)
        self.narrow = nn.Linear(OUT, 12)
        self.point = nn.Conv2d(OUT, IN, 1)
        self.wide = nn.Conv2d(IN, IN, 3, padding=1)


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Block:
    monkeypatch.setattr(low_bit_layers, "LEAST_WEIGHTS", 0)
    torch.manual_seed(0)
    return Block().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_names_weights_and_plain_results_outside_of_training(block: Block, kind: LowBit) -> None:
    state, x, pixels = dict(block.state_dict()), drawn(5, IN), torch.randn(2, OUT, 3, 4)
    plain = block.up(x), block.point(pixels)
    layers = LowBitLayers([block], kind)
    assert len(layers) == 2
    assert list(block.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
    with layers.at_work():
        low = block.up(x), block.point(pixels)
    again = block.up(x), block.point(pixels)
    for before, within, after in zip(plain, low, again, strict=True):
        assert torch.equal(before, after)
        assert not torch.equal(before, within)
        assert float((within - before).norm() / before.norm()) < (0.02 if kind == "int8" else 0.08)


def test_a_convolution_of_single_pixels_is_the_linear_layer_of_every_pixel(block: Block) -> None:
    x = torch.randn(2, OUT, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    weight = low_bit_weight(block.point.weight.flatten(1), "int8")
    expected = low_bit_linear(x.detach().permute(0, 2, 3, 1), weight, block.point.bias).permute(0, 3, 1, 2)
    with LowBitLayers([block], "int8").at_work():
        out = block.point(x)
    assert torch.equal(out, expected)
    grad = torch.randn(out.shape)
    out.backward(grad)
    assert x.grad is not None
    rows = transposed_low_bit_product(grad.permute(0, 2, 3, 1).reshape(-1, IN), weight)
    assert torch.equal(x.grad.permute(0, 2, 3, 1).reshape(-1, OUT), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_copies_take_the_bytes_that_are_predicted(block: Block, kind: LowBit) -> None:
    predicted = low_bit_copies([block], kind)
    LowBitLayers([block], kind)
    held = [low_bit_layers.LowBitLinear, low_bit_layers.LowBitPointwise]
    copies = [layer.low_bit for layer in block.modules() if type(layer) in held]
    matrices = [part for copy in copies for part in (copy.values, copy.columns) if part is not None]
    assert sum(part.numel() * part.element_size() for part in matrices) == predicted
    assert predicted == low_bit_bytes(2 * OUT * IN, kind) == 2 * OUT * IN * (2 if kind == "fp8" else 1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_adapter_beside_a_layer_in_low_bit_is_computed_plainly(block: Block, dropout: float) -> None:
    form = AdapterForm(rank=4, alpha=2.0, kind="lora", dropout=dropout)
    adapter = attach({"unet": block}, {"unet": ["up"]}, seed=1, form=form)
    layer = next(iter(adapter.layers.values())).eval()
    with torch.no_grad():
        layer.lora_B.normal_()
    x, grad = drawn(5, IN).requires_grad_(), drawn(5, OUT, seed=3)
    weight = low_bit_weight(layer.base.weight, "int8")
    with LowBitLayers([block], "int8").at_work():
        assert low_bit_of(layer.base) is not None
        out = layer(x)
        out.backward(grad)
    A, B, rows = layer.lora_A.detach(), layer.lora_B.detach(), x.detach()
    expected = low_bit_product(rows, weight) + layer.bias + 0.5 * (rows @ A.T @ B.T)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        x.grad, transposed_low_bit_product(grad, weight) + 0.5 * (grad @ B @ A), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(layer.lora_A.grad, 0.5 * (grad @ B).T @ rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.lora_B.grad, 0.5 * grad.T @ (rows @ A.T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "init"), [("dora", "gaussian"), ("lokr", "gaussian"), ("oft", "gaussian"), ("lora", "pissa")]
)
def test_every_kind_of_adapter_takes_the_frozen_product_from_the_layer(block: Block, kind: str, init: str) -> None:
    """With a weight and inputs that 8 bits hold exactly, nothing is rounded: all numbers are the plain ones."""
    generator = torch.Generator().manual_seed(4)

    def whole(rows: int) -> Tensor:
        numbers = torch.randint(-126, 127, (rows, IN), generator=generator).float()
        numbers[:, 0] = 127
        return numbers / 64

    with torch.no_grad():
        block.up.weight.copy_(whole(OUT))
    adapter = attach(
        {"unet": block}, {"unet": ["up"]}, seed=1, form=AdapterForm(rank=4, alpha=2.0, kind=kind, init=init)
    )
    layer = next(iter(adapter.layers.values()))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    x = whole(5)
    expected = layer(x)
    layers = LowBitLayers([block], "int8")
    with layers.at_work():
        found = layer(x)
        rounded_input = layer(x + 0.3)  # no longer exact: shows that the product in 8 bits is at work
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((rounded_input - layer(x + 0.3)).detach().abs().max()) > 1e-3


def test_every_layer_of_a_model_makes_its_product_in_low_bit_once_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else computes layers together or otherwise must not take the plain weight behind their backs."""
    monkeypatch.setattr(low_bit_layers, "LEAST_WEIGHTS", 0)
    family, adapter = family_with_adapter(tmp_path)
    batch = family.drawn(picture_batch("a"), Draws(3))
    layers = LowBitLayers(family.wide_parts(), "int8")
    scaled, matrices = low_bit._scaled, []
    monkeypatch.setattr(
        low_bit, "_scaled", lambda x, w, m, s: matrices.append(w.values.data_ptr()) or scaled(x, w, m, s)
    )
    with layers.at_work():
        loss = family.loss(batch, Draws(3)).total
        assert len(matrices) == len(set(matrices)) == len(layers)
        loss.backward()
    backward = matrices[len(layers) :]
    assert len(backward) == len(set(backward)) > len(layers) // 2, "keys and values of captions need no gradient"
    assert all(parameter.grad is not None for parameter in adapter.parameters())
