"""The DDPM objective against diffusers' scheduler and training helpers, to float32 rounding."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from lora_scripts.errors import ModelError
from lora_scripts.objectives.ddpm import (
    NoiseSchedule,
    add_noise,
    sample_timesteps,
    snr,
    training_target,
)
from lora_scripts.objectives.noise import offset_noise
from lora_scripts.objectives.weights import debiased_weights, min_snr_weights
from lora_scripts.training.draws import Draws

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
CONFIGS = {
    "sd15": SD15,
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {**SD15, "num_train_timesteps": 50},
    "v": {**SD15, "prediction_type": "v_prediction"},
    "zero_snr": {**SD15, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "trained": {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
}


@pytest.fixture(params=list(CONFIGS))
def both(request):
    config = CONFIGS[request.param]
    return NoiseSchedule.from_config(config), DDPMScheduler.from_config(config)


def batch(schedule):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 7, 4, 5, 6, generator=generator)
    last = schedule.num_train_timesteps - 1
    timesteps = torch.tensor([0, 1, last // 3, last // 2, 2 * last // 3, last - 1, last])
    return latents, noise, timesteps


def test_alphas_cumprod_are_those_of_diffusers_to_the_bit(both):
    ours, theirs = both
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.num_train_timesteps == theirs.config.num_train_timesteps


def test_noisy_latents_are_those_of_diffusers(both):
    ours, theirs = both
    latents, noise, timesteps = batch(ours)
    torch.testing.assert_close(
        add_noise(ours, latents, noise, timesteps), theirs.add_noise(latents, noise, timesteps), atol=1e-6, rtol=1e-6
    )


def test_target_is_noise_or_the_velocity_of_diffusers(both):
    ours, theirs = both
    latents, noise, timesteps = batch(ours)
    target = training_target(ours, latents, noise, timesteps)
    if theirs.config.prediction_type == "epsilon":
        assert torch.equal(target, noise)
    else:
        torch.testing.assert_close(target, theirs.get_velocity(latents, noise, timesteps), atol=1e-6, rtol=1e-6)


def test_velocity_can_be_asked_for_and_differs_from_the_noise():
    ours = NoiseSchedule.from_config(SD15, prediction="v_prediction")
    latents, noise, timesteps = batch(ours)
    theirs = DDPMScheduler.from_config(SD15).get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(training_target(ours, latents, noise, timesteps), theirs, atol=1e-6, rtol=1e-6)


def test_snr_is_that_of_diffusers(both):
    ours, theirs = both
    timesteps = torch.arange(ours.num_train_timesteps)
    torch.testing.assert_close(snr(ours, timesteps), compute_snr(theirs, timesteps), rtol=1e-5, atol=0)


def test_zero_terminal_snr_leaves_nothing_of_the_picture():
    ours = NoiseSchedule.from_config(SD15, zero_snr=True)
    latents, noise, _ = batch(ours)
    last = torch.full((7,), 999)
    torch.testing.assert_close(add_noise(ours, latents, noise, last), noise, atol=1e-6, rtol=0)
    assert snr(ours, last[:1]).item() == 0
    plain = NoiseSchedule.from_config(SD15)
    torch.testing.assert_close(ours.alphas_cumprod[0], plain.alphas_cumprod[0])


def test_min_snr_weights_are_those_of_the_training_scripts_of_diffusers(both):
    ours, theirs = both
    timesteps = torch.arange(ours.num_train_timesteps - 1)
    ratio = compute_snr(theirs, timesteps)
    capped = torch.stack([ratio, 5.0 * torch.ones_like(ratio)], dim=1).min(dim=1)[0]
    ours_ratio = snr(ours, timesteps)
    torch.testing.assert_close(min_snr_weights(ours_ratio, 5.0, "epsilon"), capped / ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        min_snr_weights(ours_ratio, 5.0, "v_prediction"), capped / (ratio + 1), rtol=1e-5, atol=0
    )


def test_weights_are_finite_at_a_zero_terminal():
    ratio = torch.tensor([0.0, 1e-6, 5.0, 1e3])
    assert min_snr_weights(ratio, 5.0, "epsilon").tolist() == pytest.approx([1.0, 1.0, 1.0, 0.005])
    assert min_snr_weights(ratio, 5.0, "v_prediction").tolist() == pytest.approx([0.0, 1e-6, 5 / 6, 5 / 1001])
    assert debiased_weights(ratio, "epsilon").tolist() == pytest.approx([1000.0, 1000.0, 5**-0.5, 1e3**-0.5])
    assert debiased_weights(ratio, "v_prediction").tolist() == pytest.approx([1.0, 1 / (1 + 1e-6), 1 / 6, 1 / 1001])


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_cap_must_be_positive(gamma):
    with pytest.raises(ValueError, match="gamma must be positive"):
        min_snr_weights(torch.ones(2), gamma, "epsilon")


def test_half_precision_latents_get_the_float32_noise_level():
    ours = NoiseSchedule.from_config(SD15)
    latents, noise, timesteps = batch(ours)
    exact = add_noise(ours, latents, noise, timesteps)
    half = add_noise(ours, latents.bfloat16(), noise.bfloat16(), timesteps)
    assert half.dtype == torch.bfloat16
    # Three roundings of 2**-9 on numbers up to about 4.
    torch.testing.assert_close(half.float(), exact, atol=0.04, rtol=0.01)


def test_offset_noise_moves_each_channel_as_a_whole():
    noise, offsets = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 1, 1)
    moved = offset_noise(noise, offsets, 0.1)
    torch.testing.assert_close(moved - noise, (0.1 * offsets).expand(2, 3, 4, 4), atol=1e-6, rtol=0)
    assert offset_noise(noise, offsets, 0.0) is noise


def test_timesteps_are_those_of_the_draws_and_stay_in_range():
    keys = [str(i) for i in range(500)]
    timesteps = sample_timesteps(Draws(3), keys, 1000, low=100, high=200)
    assert timesteps.min() >= 100
    assert timesteps.max() < 200
    assert torch.equal(sample_timesteps(Draws(3), keys, 1000), Draws(3).integers(keys, 0, 1000, "timestep"))


def test_unknown_schedule_and_prediction_are_refused():
    with pytest.raises(ModelError, match="beta_schedule 'sigmoid' is not known; known: linear, scaled_linear"):
        NoiseSchedule.from_config({"beta_schedule": "sigmoid"})
    with pytest.raises(ModelError, match="prediction_type 'sample' cannot be trained"):
        NoiseSchedule.from_config({"prediction_type": "sample"})


def test_stratified_timesteps_are_uniform_on_average_and_one_in_each_part() -> None:
    width = 1 / 8
    counts = torch.zeros(10)
    for step in range(400):
        turn = Draws(step).uniform(["turn"], "turn").item()
        strata = [((place * width + turn) % 1.0, width) for place in range(8)]
        timesteps = sample_timesteps(Draws(5), [f"{step}/{i}" for i in range(8)], 1000, strata=strata)
        assert 0 <= int(timesteps.min()) <= int(timesteps.max()) <= 999
        ordered = timesteps.sort().values
        assert int((ordered[1:] - ordered[:-1]).max()) <= 250  # neighbours lie in neighbouring parts
        counts += torch.bincount(timesteps // 100, minlength=10)
    assert torch.allclose(counts / counts.sum(), torch.full((10,), 0.1), atol=0.012)


def test_stratified_timesteps_do_not_depend_on_how_a_step_is_cut() -> None:
    keys, strata = [str(i) for i in range(6)], [(i / 6, 1 / 6) for i in range(6)]
    whole = sample_timesteps(Draws(5), keys, 1000, low=50, high=900, strata=strata)
    parts = [
        sample_timesteps(Draws(5), keys[i : i + 2], 1000, low=50, high=900, strata=strata[i : i + 2]) for i in (0, 2, 4)
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert int(whole.min()) >= 50
    assert int(whole.max()) < 900


def test_debiased_weights_are_those_of_sd_scripts(both):
    ours, theirs = both
    timesteps = torch.arange(ours.num_train_timesteps - 1)
    ratio = compute_snr(theirs, timesteps).clamp(max=1000)
    for prediction, expected in (("epsilon", (ratio**-0.5).clamp(max=1000)), ("v_prediction", 1 / (ratio + 1))):
        torch.testing.assert_close(debiased_weights(snr(ours, timesteps), prediction), expected, rtol=1e-5, atol=0)
