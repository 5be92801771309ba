from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import ExportError
from lora_scripts.export.bake import GOOD_ENOUGH, bake, bake_kinds
from lora_scripts.export.diffusers import to_diffusers
from lora_scripts.export.kohya import to_kohya
from lora_scripts.export.vllm import VLLM_RANKS


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(rank: int, alpha: float, out: int = 24, inside: int = 40, seed: int = 0) -> LoRATensors:
    return LoRATensors(draw(rank, inside, seed=seed), draw(out, rank, seed=seed + 1), alpha)


def dora(rank: int, moved: float, out: int = 24, inside: int = 40) -> tuple[LoRATensors, Tensor]:
    """A DoRA whose row lengths are `moved` away from those of its weight, and that weight."""
    weight = draw(out, inside, seed=9)
    tensors = LoRATensors(0.1 * draw(rank, inside), draw(out, rank, seed=1), float(rank))
    lengths = (weight + tensors.delta()).norm(dim=1)
    return LoRATensors(tensors.lora_A, tensors.lora_B, tensors.alpha, lengths * (1 + moved * draw(out, seed=2))), weight


def test_plain_lora_keeps_its_bits() -> None:
    weights = {"unet.a": lora(8, 16.0), "unet.b": lora(8, 16.0, seed=4)}
    plain, baked = bake(weights)
    assert all(torch.equal(plain[name].lora_B, weights[name].lora_B) for name in weights)
    assert (baked.rank, baked.exact, baked.folded, baked.error) == (8, True, False, 0.0)
    assert str(baked) == "plain LoRA of rank 8, as trained: nothing lost"


@pytest.mark.parametrize("alpha", [16 * 8**0.5, 0.3])
def test_alpha_with_a_fraction_is_folded_into_b(alpha: float) -> None:
    weights = {"unet.a": lora(8, alpha)}
    plain, baked = bake(weights)
    assert plain["unet.a"].alpha == 8.0
    assert baked.folded
    torch.testing.assert_close(plain["unet.a"].delta(), weights["unet.a"].delta(), atol=1e-5, rtol=1e-5)


def test_unequal_ranks_and_alphas_become_one_with_the_same_changes() -> None:
    convolution = LoRATensors(draw(3, 5, 3, 3), draw(6, 3, 1, 1), 2.0)
    weights = {"unet.a": lora(8, 16.0), "unet.b": lora(5, 3.0), "unet.conv": convolution}
    plain, baked = bake(weights, ranks=VLLM_RANKS)
    assert {(tensors.rank, tensors.alpha) for tensors in plain.values()} == {(8, 8.0)}
    assert baked.padded == 2
    for name, tensors in weights.items():
        torch.testing.assert_close(plain[name].delta(), tensors.delta(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (130, 256), (512, 512)])
def test_rank_is_filled_up_to_one_that_vllm_knows(rank: int, allowed: int) -> None:
    weights = {"model.a": lora(rank, float(rank), 520, 520)}
    plain, baked = bake(weights, ranks=VLLM_RANKS)
    assert plain["model.a"].rank == baked.rank == allowed
    torch.testing.assert_close(plain["model.a"].delta(), weights["model.a"].delta(), atol=1e-3, rtol=1e-4)


def test_rank_above_all_known_ones_is_refused() -> None:
    with pytest.raises(ExportError, match=r"rank 513 is above what this reader knows \(1, 8, 16, .*512\)\. Train with"):
        bake({"model.a": lora(513, 513.0, 520, 520)}, ranks=VLLM_RANKS)


def test_dora_is_baked_with_the_error_that_it_states() -> None:
    tensors, weight = dora(2, moved=0.02)
    plain, baked = bake({"unet.a": tensors}, lambda name: weight)
    change = tensors.delta(weight)
    missing = float((plain["unet.a"].delta() - change).norm() / change.norm())
    assert plain["unet.a"].magnitude is None
    assert 0 < baked.error == pytest.approx(missing, rel=1e-3)
    best = torch.linalg.svdvals(change)[baked.rank :].norm() / change.norm()
    assert missing == pytest.approx(float(best), rel=1e-3)
    assert "is not in it" in str(baked)
    assert "unet.a" in str(baked)


def test_rank_of_a_baked_dora_grows_until_the_error_is_small() -> None:
    little, weight = dora(2, moved=0.001)
    much, _ = dora(2, moved=0.05)
    _, small = bake({"unet.a": little}, lambda name: weight)
    _, large = bake({"unet.a": much}, lambda name: weight)
    assert small.rank == 2
    assert small.error <= GOOD_ENOUGH
    assert large.rank > 2


def test_dora_of_full_rank_is_exact() -> None:
    tensors, weight = dora(6, moved=0.3, out=12, inside=16)
    plain, baked = bake({"unet.a": tensors}, lambda name: weight)
    assert baked.rank == 12
    assert baked.error < 1e-5
    torch.testing.assert_close(plain["unet.a"].delta(), tensors.delta(weight), atol=1e-4, rtol=1e-4)


def test_file_that_holds_any_alpha_leaves_a_plain_lora_alone() -> None:
    weights = {"unet.a": lora(3, 2.5), "unet.b": lora(5, 2.5)}
    plain, baked = bake_kinds(weights, lambda name: pytest.fail("no frozen weight is needed"))
    assert plain == weights
    assert baked.exact


def test_layers_without_magnitudes_keep_their_change_beside_a_dora() -> None:
    tensors, weight = dora(2, moved=0.01)
    other = lora(3, 2.5)
    plain, baked = bake_kinds({"unet.a": tensors, "unet.b": other}, lambda name: weight)
    assert {(layer.rank, layer.alpha) for layer in plain.values()} == {(baked.rank, float(baked.rank))}
    torch.testing.assert_close(plain["unet.b"].delta(), other.delta(), atol=1e-5, rtol=1e-5)
    assert (baked.num_layers, baked.num_approximated) == (2, 1)


def test_dora_that_changes_nothing_is_baked_into_nothing() -> None:
    weight = draw(12, 16)
    tensors = LoRATensors(draw(2, 16), torch.zeros(12, 2), 2.0, weight.norm(dim=1))
    plain, baked = bake({"unet.a": tensors}, lambda name: weight)
    assert plain["unet.a"].delta().abs().max() < 1e-6
    assert baked.error <= 1


def test_writers_refuse_a_dora_that_was_not_baked() -> None:
    tensors, _ = dora(2, moved=0.1)
    for write in (
        lambda w: to_kohya(w, None, torch.float32),
        lambda w: to_diffusers(w, torch.float32),
    ):
        with pytest.raises(ExportError, match=r"unet\.a is a DoRA, which this kind of file has no place for\. Bake it"):
            write({"unet.a": tensors})
