"""The family's encodings and loss against diffusers' own parts, put together as its LoRA example does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch.nn import functional as F

from lora_scripts.config import RunConfig
from lora_scripts.families.protocol import Batch
from lora_scripts.families.sd15 import StableDiffusion15
from lora_scripts.models.source import resolve_base_model
from lora_scripts.training.draws import Draws

CAPTIONS = ["a red cat on the beach", "", "two blue sailboats " * 30]
KEYS = ["0/0/a", "0/0/b", "1/0/a"]


def load(settings: Callable[..., dict[str, Any]], **changes: Any) -> StableDiffusion15:
    config = RunConfig.model_validate(settings(**changes))
    return StableDiffusion15.load(resolve_base_model(config.base_model), config, torch.device("cpu"), torch.float32)


@pytest.fixture
def reference(tiny_sd_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)


def encode(family: StableDiffusion15, pixels: torch.Tensor) -> Batch:
    images, texts = family.encoders()
    rows = [{**image, **text} for image, text in zip(images.run(list(pixels)), texts.run(CAPTIONS), strict=True)]
    return Batch({key: torch.stack([row[key] for row in rows]) for key in rows[0]}, CAPTIONS, KEYS)


def test_latents_are_diffusers_latents(settings: Any, reference: Any) -> None:
    family = load(settings)
    pixels = torch.rand(3, 3, 32, 48) * 2 - 1
    batch = encode(family, pixels)
    with torch.no_grad():
        posterior = reference.vae.encode(pixels).latent_dist
    scale = reference.vae.config.scaling_factor
    assert torch.allclose(batch.tensors["latents_mean"], posterior.mean * scale, atol=1e-5)
    assert torch.allclose(batch.tensors["latents_std"], posterior.std * scale, atol=1e-5)


def test_text_embeddings_are_the_pipelines(settings: Any, reference: Any) -> None:
    family = load(settings)
    embeds = encode(family, torch.zeros(3, 3, 32, 32)).tensors["prompt_embeds"]
    expected, _ = reference.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=False)
    assert embeds.shape == (3, 77, expected.shape[2])
    assert torch.allclose(embeds, expected, atol=1e-5)


def test_clip_skip_counts_as_the_webui_does(settings: Any, reference: Any) -> None:
    family = load(settings, clip_skip=2)
    embeds = encode(family, torch.zeros(3, 3, 32, 32)).tensors["prompt_embeds"]
    ids = reference.tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoder = reference.text_encoder
    with torch.no_grad():
        layers = encoder(ids, output_hidden_states=True).hidden_states
        expected = getattr(encoder, "text_model", encoder).final_layer_norm(layers[-2])
    assert torch.allclose(embeds, expected, atol=1e-5)
    assert not torch.allclose(embeds, layers[-1], atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0, 5.0])
def test_loss_is_that_of_diffusers_parts(settings: Any, reference: Any, prediction: str, gamma: float) -> None:
    family = load(settings, prediction=prediction, min_snr_gamma=gamma)
    batch = encode(family, torch.rand(3, 3, 32, 32) * 2 - 1)
    draws = Draws(42)
    with torch.no_grad():
        loss = family.loss(batch, draws)

        scheduler = DDPMScheduler.from_config(reference.scheduler.config, prediction_type=prediction)
        shape = batch.tensors["latents_mean"].shape[1:]
        latents = batch.tensors["latents_mean"] + batch.tensors["latents_std"] * draws.normal(KEYS, shape, "posterior")
        noise = draws.normal(KEYS, shape, "noise")
        timesteps = draws.integers(KEYS, 0, 1000, "timestep")
        noisy = scheduler.add_noise(latents, noise, timesteps)
        answer = reference.unet(noisy, timesteps, batch.tensors["prompt_embeds"]).sample
        target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        expected = F.mse_loss(answer, target, reduction="none").mean(dim=(1, 2, 3))
        if gamma:
            from diffusers.training_utils import compute_snr

            ratio = compute_snr(scheduler, timesteps)
            divisor = ratio if prediction == "epsilon" else ratio + 1
            expected = expected * ratio.clamp(max=gamma) / divisor
    assert loss.count == 3
    assert torch.allclose(loss.total, expected.sum(), rtol=1e-5)


def test_loss_of_a_batch_is_the_sum_of_its_parts(settings: Any) -> None:
    family = load(settings, noise_offset=0.1)
    batch = encode(family, torch.rand(3, 3, 32, 32) * 2 - 1)
    parts = [
        Batch({k: v[i : i + 1] for k, v in batch.tensors.items()}, CAPTIONS[i : i + 1], KEYS[i : i + 1])
        for i in range(3)
    ]
    with torch.no_grad():
        whole = family.loss(batch, Draws(1)).total
        pieces = sum(family.loss(part, Draws(1)).total for part in parts)
    assert torch.allclose(whole, pieces, rtol=1e-5)


def test_caption_over_the_limit_is_cut_where_the_encoder_stops_reading(settings: Any) -> None:
    family = load(settings)
    long = "red cat " * 100
    kept = family.cut_caption(long)
    assert kept == long[: len(kept)]
    assert len(kept.split()) == 75
    assert family.cut_caption("a short one") == "a short one"
