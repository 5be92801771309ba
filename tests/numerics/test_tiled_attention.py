"""Attention in tiles, against torch's own and against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_scripts.models import tiled_attention as module
from lora_scripts.models.tiled_attention import attention, tiled_attention

apply = module._TiledAttention.apply

SHAPES = {
    "self": (2, 3, 50, 50, 8),
    "of a caption": (2, 3, 64, 7, 40),
    "more keys than a tile has scores": (1, 2, 5, 400, 16),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v laid out as projections leave them, and a gradient of the output."""
    batch, heads, queries, keys, width = shape
    torch.manual_seed(0)
    lengths = (queries, keys, keys, queries)
    return [torch.randn(batch, length, heads, width, dtype=dtype).transpose(1, 2) for length in lengths]


def with_gradients(of: object, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in (q, k, v)]
    out = of(*leaves)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@pytest.mark.parametrize("tile_scores", [1, 300, 2**21], ids=["one query", "parts of a head", "whole heads"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], tile_scores: int
) -> None:
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    tensors = inputs(shape, torch.float64)
    ours = with_gradients(tiled_attention, *tensors)
    torch.testing.assert_close(ours, with_gradients(F.scaled_dot_product_attention, *tensors))


@pytest.mark.parametrize("tile_scores", [300, 2**21], ids=["parts of a head", "whole heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_queries_filled_up_without_a_gradient_change_no_answer(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tile_scores: int
) -> None:
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    monkeypatch.setattr(module, "FEWEST_FILLED", 1)
    q, k, v, _ = inputs((2, 3, 53, 19, 8), dtype)
    rows = []
    monkeypatch.setattr(module._TiledAttention, "apply", lambda q, *given: rows.append(q.shape[2]) or apply(q, *given))
    with torch.no_grad():
        ours = tiled_attention(q, k, v)
    leaf = q.detach().requires_grad_()
    with_gradient = tiled_attention(leaf, k, v)
    assert rows == [56, 53]
    close = {"rtol": 2e-2, "atol": 8e-3} if dtype is torch.bfloat16 else {}
    for out in (ours, with_gradient.detach()):
        assert out.shape == q.shape
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), **close)


@pytest.mark.parametrize("tile_scores", [300, 2**21], ids=["parts of a head", "whole heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("offset", [0.0, 60.0, -60.0], ids=["wide", "all high", "all low"])
def test_scores_whose_powers_no_number_holds_come_out_as_exactly_as_in_a_written_softmax(
    monkeypatch: pytest.MonkeyPatch, offset: float, dtype: torch.dtype, tile_scores: int
) -> None:
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    q, k, v, d_out = inputs((1, 3, 40, 40, 8), dtype)
    if offset:
        q[..., 0], k[..., 0] = offset, 8.0  # 170 more or less for all scores
    else:
        q, k = 12 * q, 12 * k

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * 8**-0.5, -1) @ v

    exact = with_gradients(written, *(each.double() for each in (q, k, v, d_out)))
    sides = [with_gradients(of, q, k, v, d_out) for of in (tiled_attention, written)]
    for ours, theirs, reference in zip(*sides, exact, strict=True):
        errors = [float((got.double() - reference).norm()) for got in (ours, theirs)]
        assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize(("offset", "falls_back"), [(0.0, False), (60.0, True), (-60.0, True)])
def test_in_float32_without_a_gradient_heads_are_computed_one_by_one_as_exactly_as_by_torch(
    monkeypatch: pytest.MonkeyPatch, offset: float, falls_back: bool
) -> None:
    monkeypatch.setattr(module, "LARGE_PRODUCT", 1)
    tiles = []
    monkeypatch.setattr(module._TiledAttention, "apply", lambda *given: tiles.append(given) or apply(*given))
    q, k, v, _ = inputs((2, 3, 53, 19, 8), torch.float32)
    if offset:
        q[..., 0], k[..., 0] = offset, 8.0
    with torch.no_grad():
        ours = tiled_attention(q, k, v, scale=0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
    assert bool(tiles) == falls_back
    assert ours.shape == q.shape
    assert ours.transpose(1, 2).flatten(2).is_contiguous()
    errors = [float((got.double() - exact).norm()) for got in (ours, theirs)]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("rows", [1, 7, 256])
def test_causal_output_and_gradients_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(module, "CAUSAL_ROWS", rows)
    tensors = inputs((2, 3, 50, 50, 8), torch.float64)
    ours = with_gradients(lambda q, k, v: tiled_attention(q, k, v, scale=0.2, causal=True), *tensors)
    theirs = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2), *tensors
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("large_product", [1, 2**60], ids=["through oneDNN", "through torch"])
@pytest.mark.parametrize("tile_scores", [300, 2**21], ids=["parts of a head", "whole heads"])
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_in_float32_errors_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, causal: bool, tile_scores: int, large_product: int
) -> None:
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    monkeypatch.setattr(module, "LARGE_PRODUCT", large_product)
    tensors = inputs((2, 3, 90, 90, 72), torch.float32)
    ours = with_gradients(lambda q, k, v: tiled_attention(q, k, v, causal=causal), *tensors)
    theirs = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), *tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_errors_are_of_the_size_of_one_rounding() -> None:
    tensors = inputs((2, 4, 256, 256, 40), torch.bfloat16)
    exact = with_gradients(F.scaled_dot_product_attention, *(each.double() for each in tensors))
    for ours, reference in zip(with_gradients(tiled_attention, *tensors), exact, strict=True):
        assert ours.dtype is torch.bfloat16
        assert float((ours.double() - reference).norm()) < 2**-7 * float(reference.norm())


def test_bfloat16_and_large_heads_in_float32_are_computed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(module, "tiled_attention", lambda q, k, v, **how: asked.append(q.dtype) or q)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        attention(*inputs(SHAPES["self"], dtype)[:3])
    assert asked == [torch.bfloat16]
    attention(*inputs((1, 1, 1024, 512, 8), torch.float32)[:3])
    assert asked == [torch.bfloat16, torch.float32]
