import pytest
import torch

from lora_scripts.adapters.resize import fit_rank
from lora_scripts.adapters.weights import LoRATensors


def made(*, out=12, into=(7, 3, 3), rank=6, alpha=4.0):
    generator = torch.Generator().manual_seed(1)
    up_shape = (out, rank) if len(into) == 1 else (out, rank, 1, 1)
    return LoRATensors(
        torch.randn(rank, *into, generator=generator), torch.randn(*up_shape, generator=generator), alpha
    )


@pytest.mark.parametrize("into", [(20,), (7, 3, 3)])
def test_smaller_rank_is_the_nearest_change_of_that_rank(into):
    tensors = made(into=into)
    small, kept = fit_rank(tensors, 2)
    assert small.rank == 2
    assert small.lora_A.shape == (2, *into)
    u, s, v = torch.linalg.svd(tensors.delta().flatten(1).double(), full_matrices=False)
    nearest = (u[:, :2] * s[:2]) @ v[:2]
    torch.testing.assert_close(small.delta().flatten(1).double(), nearest, atol=1e-5, rtol=1e-5)
    assert kept == pytest.approx(float(s[:2].square().sum() / s.square().sum()), rel=1e-6)


def test_smaller_rank_keeps_the_scale():
    tensors = made()
    small, _ = fit_rank(tensors, 3)
    assert small.scale == pytest.approx(tensors.scale)


def test_smaller_rank_loses_nothing_of_a_change_that_needs_no_more():
    tensors = made(rank=6)
    low = LoRATensors(tensors.lora_A, tensors.lora_B.clone(), 4.0)
    low.lora_B[:, 2:] = 0
    small, kept = fit_rank(low, 2)
    assert kept == pytest.approx(1.0)
    torch.testing.assert_close(small.delta(), low.delta(), atol=1e-5, rtol=1e-5)


def test_larger_rank_returns_the_tensors_as_they_are():
    tensors = made()
    same, kept = fit_rank(tensors, 8)
    assert same is tensors
    assert kept == 1.0


def test_zero_change_can_be_resized():
    tensors = made()
    tensors.lora_B.zero_()
    small, kept = fit_rank(tensors, 2)
    assert kept == 1.0
    assert not small.delta().any()
