"""Cutting a change to a rank: against the dense singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from lora_scripts.adapters.spectrum import EXACT_UP_TO, Spectrum, concatenated, spectrum_of_matrix, spectrum_of_sum
from lora_scripts.adapters.weights import LoRATensors


def made(rank: int, *, out: int = 96, into: tuple[int, ...] = (80,), alpha: float = 5.0, seed: int = 0) -> LoRATensors:
    generator = torch.Generator().manual_seed(seed)
    kernel = into[1:]
    down = torch.randn(rank, *into, generator=generator) * torch.arange(1, rank + 1).float().pow(-0.7).reshape(
        -1, *[1] * len(into)
    )
    return LoRATensors(down, torch.randn(out, rank, *[1] * len(kernel), generator=generator), alpha)


def dense(lora: LoRATensors) -> torch.Tensor:
    return lora.scale * (lora.lora_B.double().flatten(1) @ lora.lora_A.double().flatten(1))


@pytest.mark.parametrize("into", [(80,), (9, 3, 3)])
def test_rank_64_cut_to_16_keeps_what_the_eckart_young_bound_allows(into: tuple[int, ...]) -> None:
    lora = made(64, into=into)
    spectrum = spectrum_of_sum([(lora, 1.0)])
    small = spectrum.cut(16)
    values = torch.linalg.svdvals(dense(lora))
    best = values[16:].norm()
    assert float((dense(lora) - dense(small)).norm()) == pytest.approx(float(best), rel=1e-4)
    assert spectrum.lost(16) == pytest.approx(float(best**2), rel=1e-9)
    assert small.delta().shape == (96, *into)


def test_rank_for_a_share_is_the_smallest_that_keeps_it() -> None:
    lora = made(24)
    spectrum = spectrum_of_sum([(lora, 1.0)])
    squares = torch.linalg.svdvals(dense(lora))[:24].square()
    for share in (0.3, 0.9, 0.98):
        rank = spectrum.rank_for(share)
        assert squares[:rank].sum() >= share * squares.sum() > squares[: rank - 1].sum()


def test_whole_share_asks_for_the_true_rank_and_no_more() -> None:
    lora = made(6)
    doubled = LoRATensors(torch.cat([lora.lora_A] * 2), torch.cat([lora.lora_B] * 2, dim=1), lora.alpha)
    spectrum = spectrum_of_sum([(doubled, 1.0)])
    assert spectrum.rank_for(1 - 1e-12) == 6


def test_sum_of_loras_is_cut_as_the_sum_of_their_changes_is() -> None:
    first, second = made(8, seed=1), made(12, alpha=3.0, seed=2)
    total = 0.7 * dense(first) - 0.4 * dense(second)
    small = spectrum_of_sum([(first, 0.7), (second, -0.4)]).cut(10, scale=0.5)
    assert small.scale == pytest.approx(0.5)
    best = torch.linalg.svdvals(total)[10:].norm()
    assert float((total - dense(small)).norm()) == pytest.approx(float(best), rel=1e-4)


def test_ranks_above_the_layers_sides_are_cut_too() -> None:
    lora = made(30, out=12, into=(20,))
    spectrum = spectrum_of_sum([(lora, 1.0)])
    assert len(spectrum.values) == 12
    torch.testing.assert_close(dense(spectrum.cut(12)), dense(lora), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("into", [(80,), (9, 3, 3)])
def test_concatenation_is_the_weighted_sum_of_the_changes(into: tuple[int, ...]) -> None:
    first, second = made(4, into=into, seed=1), made(6, into=into, alpha=2.0, seed=2)
    both = concatenated([(first, 0.7), (second, -1.3)])
    assert both.rank == 10
    assert both.alpha == 10
    wanted = 0.7 * first.delta().double() - 1.3 * second.delta().double()
    torch.testing.assert_close(both.delta().double(), wanted, atol=1e-5, rtol=1e-5)


def test_concatenation_at_scale_and_strength_one_keeps_every_bit() -> None:
    first, second = made(4, alpha=4.0, seed=1), made(6, alpha=6.0, seed=2)
    both = concatenated([(first, 1.0), (second, 1.0)])
    assert torch.equal(both.lora_A, torch.cat([first.lora_A, second.lora_A]))
    assert torch.equal(both.lora_B, torch.cat([first.lora_B, second.lora_B], dim=1))


def falling(out: int, inside: int, power: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    size = min(out, inside)
    left = torch.linalg.qr(torch.randn(out, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(inside, size, generator=generator)).Q
    return (left * torch.arange(1, size + 1).float().pow(-power)) @ right.T


@pytest.mark.parametrize("power", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("rank", [8, 64])
def test_large_matrix_is_cut_within_two_thousandths_of_the_best(power: float, rank: int) -> None:
    change = falling(EXACT_UP_TO + 200, EXACT_UP_TO + 88, power)
    spectrum = spectrum_of_matrix(change, rank, torch.Generator().manual_seed(0))
    lost = float((change.double() - dense(spectrum.cut(rank))).norm())
    assert lost == pytest.approx(float(torch.linalg.svdvals(change)[rank:].norm()), rel=2e-3)
    assert spectrum.lost(rank) ** 0.5 == pytest.approx(lost, rel=1e-4)


def test_what_a_cut_keeps_is_stated_also_where_only_the_largest_values_are_known() -> None:
    change = falling(40, 30, 0.5)
    few: Spectrum = spectrum_of_matrix(change, 5, torch.Generator())
    values = torch.linalg.svdvals(change).square()
    assert few.kept(5) == pytest.approx(float(values[:5].sum() / values.sum()), rel=1e-5)
    assert few.size == pytest.approx(float(values.sum()), rel=1e-5)


def test_change_of_zero_is_kept_whole_and_cut_to_zeros() -> None:
    lora = made(4)
    lora.lora_B.zero_()
    spectrum = spectrum_of_sum([(lora, 1.0)])
    assert spectrum.kept(1) == 1.0
    assert spectrum.rank_for(0.98) == 1
    assert not spectrum.cut(2).delta().any()
