"""LoHa and LoKr as plain LoRAs: exact where they are said to be."""

from __future__ import annotations

import pytest
import torch

from lora_scripts.adapters.low_rank_form import as_low_rank, spectrum_of
from lora_scripts.adapters.parts import change_from_parts
from lora_scripts.adapters.weights import LayerChange

CASES: dict[str, tuple[tuple[int, ...], int, dict[str, tuple[int, ...]]]] = {  # shape, rank, parts
    "LoHa": ((40, 36), 9, {"hada_w1_a": (40, 3), "hada_w1_b": (3, 36), "hada_w2_a": (40, 3), "hada_w2_b": (3, 36)}),
    "LoHa of a convolution": (
        (40, 6, 3, 3), 4, {"hada_w1_a": (40, 2), "hada_w1_b": (2, 54), "hada_w2_a": (40, 2), "hada_w2_b": (2, 54)},
    ),
    "LoKr, second factor of low rank": ((40, 36), 12, {"lokr_w1": (4, 4), "lokr_w2_a": (10, 3), "lokr_w2_b": (3, 9)}),
    "LoKr, both factors of low rank": (
        (80, 72), 6, {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (10, 3), "lokr_w2_b": (3, 9)},
    ),
    "LoKr of a convolution": ((40, 36, 3, 3), 8, {"lokr_w1": (4, 4), "lokr_w2_a": (10, 2), "lokr_w2_b": (2, 81)}),
}  # fmt: skip


def made(parts: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> LayerChange:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=generator) for name, size in parts.items()}
    return change_from_parts(tensors | {"alpha": torch.tensor(1.5)}, shape)


@pytest.mark.parametrize(("shape", "rank", "parts"), CASES.values(), ids=CASES)
def test_plain_lora_of_higher_rank_makes_the_same_change(
    shape: tuple[int, ...], rank: int, parts: dict[str, tuple[int, ...]]
) -> None:
    change = made(parts, shape)
    plain = as_low_rank(change)
    assert plain is not None
    assert (plain.rank, plain.shape) == (rank, shape)
    torch.testing.assert_close(plain.delta(), change.delta(), atol=1e-5, rtol=1e-5)
    spectrum = spectrum_of(change, None, 4, torch.Generator())
    assert spectrum.rank_for(1 - 1e-12) == rank


def test_change_of_full_rank_has_no_such_form_and_is_cut_as_a_whole() -> None:
    change = made({"lokr_w1": (4, 4), "lokr_w2": (10, 9)}, (40, 36))
    assert as_low_rank(change) is None
    spectrum = spectrum_of(change, None, 10, torch.Generator())
    best = torch.linalg.svdvals(change.delta())[10:].square().sum()
    assert spectrum.lost(10) == pytest.approx(float(best), rel=1e-4)
