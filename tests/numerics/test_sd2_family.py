"""Stable Diffusion 2's encodings, loss and previews against diffusers' own pipeline, on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline

from helpers.reference_training import CAPTIONS, encoded, load_family, part_of, reference_loss
from helpers.tiny_diffusion import save_folder, tiny_parts
from lora_scripts.families.protocol import SampleRequest
from lora_scripts.sampling.denoise import SAMPLERS, render_latents
from lora_scripts.training.draws import Draws


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts velocity, as its scheduler says."""
    parts = tiny_parts("sd2", prediction_type="v_prediction")
    return save_folder(parts, tmp_path_factory.mktemp("models") / "tiny-sd2")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    return made


def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1


def text_of(pipeline: Any) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode_prompt(list(CAPTIONS), "cpu", 1, do_classifier_free_guidance=False)[0]


def test_text_embeddings_are_the_pipelines(folder: Path, pipeline: Any) -> None:
    ours = encoded(load_family(folder), pixels()).tensors["prompt_embeds"]
    torch.testing.assert_close(ours, text_of(pipeline), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True], ids=["encoded ahead", "text encoder trained"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("setting", ["auto", "epsilon"])
def test_loss_is_that_of_diffusers_parts(
    folder: Path, pipeline: Any, trained: bool, gamma: float, setting: str
) -> None:
    family = load_family(folder, prediction=setting, min_snr_gamma=gamma, train_text_encoder=trained)
    prediction = "v_prediction" if setting == "auto" else setting
    batch, draws = encoded(family, pixels()), Draws(42)
    conditions = {"encoder_hidden_states": text_of(pipeline)}
    with torch.no_grad():
        loss = family.loss(batch, draws)
        expected = reference_loss(pipeline, batch, draws, conditions, prediction=prediction, gamma=gamma)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=0)


def test_loss_of_a_batch_is_the_sum_of_its_parts(folder: Path) -> None:
    family = load_family(folder)
    batch = encoded(family, pixels())
    with torch.no_grad():
        whole = family.loss(batch, Draws(1)).total
        halves = sum(family.loss(part_of(batch, start, start + 2), Draws(1)).total for start in (0, 2))
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_preview_is_that_of_diffusers_pipeline(folder: Path, pipeline: Any, sampler: str) -> None:
    request = SampleRequest("a red fox", "blurry", seed=7, steps=6, guidance=5.0, width=96, height=64)
    ours = render_latents(load_family(folder)._parts, [request], "cpu", sampler=sampler)[0]
    name, settings = SAMPLERS[sampler]
    scheduler = getattr(diffusers, name).from_config({**pipeline.scheduler.config, **settings})
    assert scheduler.config.prediction_type == "v_prediction"
    own = StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler, "requires_safety_checker": False})
    own.set_progress_bar_config(disable=True)
    theirs = own(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        width=request.width,
        height=request.height,
        latents=torch.randn((1, 4, 8, 12), generator=torch.Generator().manual_seed(7)),
        output_type="latent",
    ).images[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prediction", "version", "architecture"),
    [
        ("auto", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("epsilon", "sd_v2", "stable-diffusion-v2-512/lora"),
    ],
)
def test_family_says_what_readers_sort_by(folder: Path, prediction: str, version: str, architecture: str) -> None:
    family = load_family(folder, prediction=prediction)
    assert (family.name, family.base_model_version, family.modelspec_architecture) == ("sd2", version, architecture)
