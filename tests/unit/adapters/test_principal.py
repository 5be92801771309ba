import pytest
import torch

from lora_scripts.adapters.principal import EXACT_UP_TO, principal_part


def falling_spectrum(out: int, inside: int) -> torch.Tensor:
    """A matrix whose singular values fall like those of trained weights: slowly."""
    generator = torch.Generator().manual_seed(0)
    size = min(out, inside)
    left = torch.linalg.qr(torch.randn(out, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(inside, size, generator=generator)).Q
    return (left * torch.arange(1, size + 1).float().pow(-0.5)) @ right.T


@pytest.mark.parametrize(("out", "inside"), [(40, 24), (24, 40), (EXACT_UP_TO + 60, EXACT_UP_TO + 8)])
def test_product_is_nearly_the_best_of_its_rank(out: int, inside: int) -> None:
    weight = falling_spectrum(out, inside)
    A, B = principal_part(weight, 8, 1.5, torch.Generator().manual_seed(1))
    assert (A.shape, B.shape) == ((8, inside), (out, 8))
    best = torch.linalg.svdvals(weight)[8:].norm()
    assert float((weight - 1.5 * B @ A).norm()) == pytest.approx(float(best), rel=1e-3)


def test_rows_are_ordered_by_singular_value() -> None:
    weight = falling_spectrum(30, 20)
    A, B = principal_part(weight, 5, 2.0, torch.Generator())
    values = torch.linalg.svdvals(weight)[:5]
    torch.testing.assert_close(2.0 * A.square().sum(1), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(2.0 * B.square().sum(0), values, atol=1e-5, rtol=1e-5)


def test_large_matrix_is_decomposed_alike_from_the_same_generator() -> None:
    weight = falling_spectrum(EXACT_UP_TO + 8, EXACT_UP_TO + 8)
    first = principal_part(weight, 4, 1.0, torch.Generator().manual_seed(2))
    torch.randn(3)  # the global generator has no part in it
    again = principal_part(weight, 4, 1.0, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
