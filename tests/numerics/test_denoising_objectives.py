"""The options of the denoising loss against their formulas written out, on diffusers' scheduler and by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from helpers.objective_formulas import loss_by_hand, pyramid_by_hand
from lora_scripts.config import RunConfig
from lora_scripts.families.protocol import Batch
from lora_scripts.objectives.ddpm import NoiseSchedule
from lora_scripts.objectives.denoising import DenoisingObjective
from lora_scripts.objectives.errors import huber_thresholds, pseudo_huber
from lora_scripts.objectives.noise import pyramid_noise
from lora_scripts.training.draws import Draws

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
KEYS = ("0/0/a", "0/0/b", "1/0/a", "1/0/b")
SHAPE = (4, 8, 12)
CPU = torch.device("cpu")


def objective(prediction: str = "epsilon", zero_snr: bool = False, **changes: Any) -> DenoisingObjective:
    config = RunConfig(
        train_data_dir=Path(), base_model="none", output_dir=Path(), timestep_sampling="uniform", **changes
    )
    return DenoisingObjective(
        config, NoiseSchedule.from_config(SCHEDULE, prediction=prediction, zero_snr=zero_snr), CPU
    )


def batch() -> Batch:
    mean, std = torch.randn(2, len(KEYS), *SHAPE, generator=torch.Generator().manual_seed(1))
    return Batch({"latents_mean": mean, "latents_std": std.abs()}, [""] * len(KEYS), KEYS)


def latents_of(batch: Batch, draws: Draws) -> torch.Tensor:
    return batch.tensors["latents_mean"] + batch.tensors["latents_std"] * draws.normal(batch.keys, SHAPE, "posterior")


# Huber losses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.01, 0.1, 1.0])
def test_thresholds_are_those_of_the_paper_and_of_sd_scripts(c: float) -> None:
    schedule, theirs = NoiseSchedule.from_config(SCHEDULE), DDPMScheduler.from_config(SCHEDULE)
    timesteps = torch.tensor([0, 1, 250, 500, 999])
    for place, t in enumerate(timesteps.tolist()):
        share = float(theirs.alphas_cumprod[t])
        sigma = math.sqrt((1 - share) / share)
        expected = {
            "constant": c,
            "exponential": math.exp(math.log(c) * t / 1000),  # arXiv 2403.16728, equation 8
            "snr": (1 - c) / (1 + sigma) ** 2 + c,
        }
        for kind, value in expected.items():
            found = huber_thresholds(schedule, timesteps, c, kind)[place]  # type: ignore[arg-type]
            assert float(found) == pytest.approx(value, rel=1e-5)


def test_threshold_at_pure_noise_is_finite() -> None:
    schedule = NoiseSchedule.from_config(SCHEDULE, prediction="v_prediction", zero_snr=True)
    assert float(huber_thresholds(schedule, torch.tensor([999]), 0.1, "snr")) == pytest.approx(0.1)


def test_huber_forms_are_those_of_sd_scripts() -> None:
    error = torch.randn(4, *SHAPE, dtype=torch.float64) * 3
    c = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    wide = c.reshape(-1, 1, 1, 1)
    root = torch.sqrt(error**2 + wide**2) - wide
    torch.testing.assert_close(pseudo_huber(error**2, c, "huber"), 2 * wide * root)
    torch.testing.assert_close(pseudo_huber(error**2, c, "smooth_l1"), 2 * root)


def test_huber_is_the_square_of_small_errors_and_linear_in_large_ones() -> None:
    c = torch.tensor([0.1])
    small, large = torch.full((1, 1, 1, 1), 1e-4), torch.full((1, 1, 1, 1), 100.0)
    assert float(pseudo_huber(small**2, c, "huber") / small**2) == pytest.approx(1.0, rel=1e-5)
    assert float(pseudo_huber(large**2, c, "smooth_l1")) == pytest.approx(2 * (100 - 0.1), rel=1e-5)


def test_gradient_of_huber_losses_is_finite_where_the_error_is_zero() -> None:
    error = torch.zeros(1, 1, 1, 2, requires_grad=True)
    pseudo_huber(error.square(), torch.tensor([0.1]), "smooth_l1").sum().backward()
    assert error.grad is not None
    assert error.grad.tolist() == [[[[0.0, 0.0]]]]


# Pyramid noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.3), (6, 0.3), (10, 0.9)])
def test_pyramid_noise_is_that_of_sd_scripts_picture_by_picture(iterations: int, discount: float) -> None:
    draws = Draws(5)
    plain = draws.normal(KEYS, SHAPE, "noise")
    found = pyramid_noise(plain, draws, KEYS, iterations, discount)
    for place, key in enumerate(KEYS):
        expected = pyramid_by_hand(plain[place : place + 1], draws, key, iterations, discount)
        torch.testing.assert_close(found[place : place + 1], expected)


def test_pyramid_noise_has_unit_spread_and_more_of_what_is_large() -> None:
    draws = Draws(5)
    keys = [str(i) for i in range(64)]
    plain = draws.normal(keys, (4, 32, 32), "noise")
    noise = pyramid_noise(plain, draws, keys, 8, 0.5)
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), torch.ones(64), rtol=1e-4, atol=0)
    assert F.avg_pool2d(noise, 8).std() > 1.5 * F.avg_pool2d(plain, 8).std()


# Noise and target as the model is given them -------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_input_perturbation_is_put_on_and_not_asked_for(prediction: str) -> None:
    draws, data = Draws(3), batch()
    noised = objective(prediction, input_perturbation=0.1).noised(data, draws)
    scheduler = DDPMScheduler.from_config(SCHEDULE, prediction_type=prediction)
    latents, noise = latents_of(data, draws), draws.normal(KEYS, SHAPE, "noise")
    timesteps = draws.integers(KEYS, 0, 1000, "timestep")
    more = draws.normal(KEYS, SHAPE, "perturbation")
    torch.testing.assert_close(
        noised.noisy_latents, scheduler.add_noise(latents, noise + 0.1 * more, timesteps), rtol=1e-5, atol=1e-5
    )
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(noised.target, target, rtol=1e-5, atol=1e-5)


def test_offset_then_pyramid_noise_is_both_put_on_and_asked_for() -> None:
    draws, data = Draws(3), batch()
    made = objective(noise_offset=0.1, pyramid_noise_iterations=6, pyramid_noise_discount=0.4)
    noise = draws.normal(KEYS, SHAPE, "noise") + 0.1 * draws.normal(KEYS, (4, 1, 1), "offset")
    expected = torch.cat([pyramid_by_hand(noise[i : i + 1], draws, key, 6, 0.4) for i, key in enumerate(KEYS)])
    noised = made.noised(data, draws)
    torch.testing.assert_close(noised.target, expected)
    scheduler = DDPMScheduler.from_config(SCHEDULE)
    torch.testing.assert_close(
        noised.noisy_latents,
        scheduler.add_noise(latents_of(data, draws), expected, noised.timesteps),
        rtol=1e-5,
        atol=1e-5,
    )


ALL_NOISES = {"noise_offset": 0.1, "pyramid_noise_iterations": 6, "input_perturbation": 0.1}


def test_measurements_are_made_with_plain_noise_and_plain_errors() -> None:
    data = batch().at_levels([0.1, 0.4, 0.6, 0.9])
    plain = objective(min_snr_gamma=0)
    other = objective(**ALL_NOISES, debiased_estimation=True, loss_type="huber")
    ours, theirs = other.noised(data, Draws(3)), plain.noised(data, Draws(3))
    assert torch.equal(ours.noisy_latents, theirs.noisy_latents)
    assert torch.equal(ours.target, theirs.target)
    answer = torch.zeros(len(KEYS), *SHAPE)
    assert torch.equal(other.loss(answer, ours, data).per_example, plain.loss(answer, theirs, data).per_example)


def test_noise_of_a_picture_does_not_depend_on_its_batch_mates() -> None:
    made, data = objective(**ALL_NOISES), batch()
    whole = made.noised(data, Draws(3))
    for i, key in enumerate(KEYS):
        one = Batch({name: value[i : i + 1] for name, value in data.tensors.items()}, [""], [key])
        alone = made.noised(one, Draws(3))
        assert torch.equal(alone.noisy_latents[0], whole.noisy_latents[i])
        assert torch.equal(alone.target[0], whole.target[i])


def test_noise_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    objective(**ALL_NOISES).noised(batch(), Draws(3))
    assert torch.equal(torch.get_rng_state(), state)


# Errors and weights of noise levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "changes",
    [
        {"debiased_estimation": True},
        {"loss_type": "huber", "min_snr_gamma": 0},
        {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.2},
        {"loss_type": "smooth_l1", "huber_schedule": "constant", "debiased_estimation": True},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())),
)
def test_loss_is_the_formula_written_out(prediction: str, changes: dict[str, Any]) -> None:
    made, data, draws = objective(prediction, **changes), batch(), Draws(7)
    noised = made.noised(data, draws)
    answer = torch.randn(len(KEYS), *SHAPE, generator=torch.Generator().manual_seed(9))
    scheduler = DDPMScheduler.from_config(SCHEDULE)
    expected = 0.0
    for place, t in enumerate(noised.timesteps.tolist()):
        error = (answer[place] - noised.target[place]).double()
        expected += float(loss_by_hand(error, t, scheduler, prediction, changes))
    loss = made.loss(answer, noised, data)
    assert float(loss.total) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(loss.per_example, (answer - noised.target).square().mean(dim=(1, 2, 3)))
