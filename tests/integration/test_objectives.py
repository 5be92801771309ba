"""Every option of the loss in a whole run: its second step is the one put together from diffusers' parts by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from helpers.objective_formulas import loss_by_hand, pyramid_by_hand
from helpers.seen import train
from helpers.tiny_diffusion import save_folder, tiny_parts
from lora_scripts.families.latent_diffusion import LatentDiffusion
from lora_scripts.families.protocol import Batch
from lora_scripts.training.draws import Draws

Settings = Callable[..., dict[str, Any]]
KINDS = {"sd15": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}
PLAIN = {"max_steps": 2, "save_steps": 1, "timestep_sampling": "uniform", "save_precision": "fp32", "buckets": False,
         "resolution": 64, "validation_pictures": 0, "keep": "last"}  # fmt: skip


@dataclass
class Run:
    """What a run of two steps reported and was given.

    Attributes:
        losses: of both steps.
        batches: of both steps.
        lora: the file after the first step.
    """

    losses: list[float]
    batches: list[Batch]
    lora: Path


@pytest.fixture
def two_steps(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Runs two steps on a model folder."""

    def run(model: Path, output: Path, **changes: Any) -> Run:
        batches: list[Batch] = []
        honest = LatentDiffusion.loss

        def loss(self: LatentDiffusion, batch: Batch, draws: Draws) -> Any:
            if not batch.keys[0].startswith("preflight"):
                batches.append(batch)
            return honest(self, batch, draws)

        with monkeypatch.context() as patch:
            patch.setattr(LatentDiffusion, "loss", loss)
            values = settings(base_model=str(model), output_dir=str(output), **PLAIN, **changes)
            seen = train(values)
        return Run(
            [loss for report in seen.reports for loss in report.losses],
            batches,
            output / "checkpoint-1" / f"{output.name}-1.safetensors",
        )

    return run


def save_model(family: str, folder: Path) -> Path:
    return save_folder(tiny_parts(family, prediction_type=KINDS[family]), folder)


def pipeline_of(family: str, folder: Path) -> Any:
    if family == "sdxl":
        return StableDiffusionXLPipeline.from_pretrained(folder)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def conditions(pipeline: Any, batch: Batch, captions: list[str]) -> dict[str, Any]:
    """What the pipeline's U-Net is told besides latents and timesteps."""
    text = pipeline.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    if "add_time_ids" not in batch.tensors:
        return {"encoder_hidden_states": text[0]}
    added = {"text_embeds": text[2], "time_ids": batch.tensors["add_time_ids"]}
    return {"encoder_hidden_states": text[0], "added_cond_kwargs": added}


@torch.no_grad()
def step_by_hand(family: str, pipeline: Any, run: Run, changes: dict[str, Any]) -> float:
    """The loss of the second step, from the LoRA that the first one left."""
    batch, draws, prediction = run.batches[1], Draws(42), KINDS[family]
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    shape = batch.tensors["latents_mean"].shape[1:]
    latents = batch.tensors["latents_mean"] + batch.tensors["latents_std"] * draws.normal(
        batch.keys, shape, "posterior"
    )
    noise = draws.normal(batch.keys, shape, "noise")
    if "noise_offset" in changes:
        noise = noise + changes["noise_offset"] * draws.normal(batch.keys, (shape[0], 1, 1), "offset")
    if "pyramid_noise_iterations" in changes:
        iterations, discount = changes["pyramid_noise_iterations"], changes.get("pyramid_noise_discount", 0.3)
        noise = torch.cat(
            [pyramid_by_hand(noise[i : i + 1], draws, key, iterations, discount) for i, key in enumerate(batch.keys)]
        )
    more = changes.get("input_perturbation", 0) * draws.normal(batch.keys, shape, "perturbation")
    timesteps = draws.integers(batch.keys, 0, 1000, "timestep")
    noisy_latents = scheduler.add_noise(latents, noise + more, timesteps)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)

    def predicted(captions: list[str]) -> torch.Tensor:
        return pipeline.unet(noisy_latents, timesteps, **conditions(pipeline, batch, captions)).sample

    def summed(errors: torch.Tensor) -> float:
        pairs = zip(errors, timesteps.tolist(), strict=True)
        return sum(float(loss_by_hand(error, t, scheduler, prediction, changes)) for error, t in pairs)

    class_prompt = [changes.get("prior_prompt", "")] * len(batch)
    frozen = predicted(class_prompt)
    pipeline.load_lora_weights(run.lora)
    total = summed(predicted(list(batch.captions)) - target)
    total += changes.get("prior_preservation_weight", 0) * summed(predicted(class_prompt) - frozen)
    return total / len(batch)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"debiased_estimation": True},
        {"loss_type": "huber"},
        {"loss_type": "smooth_l1", "huber_schedule": "exponential", "huber_c": 0.05},
        {"pyramid_noise_iterations": 6, "pyramid_noise_discount": 0.5},
        {"input_perturbation": 0.1},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_option_reaches_the_loss_as_its_formula_says(
    family: str, changes: dict[str, Any], two_steps: Callable[..., Run], tmp_path: Path
) -> None:
    model = save_model(family, tmp_path / "model")
    plain = two_steps(model, tmp_path / "plain")
    other = two_steps(model, tmp_path / "other", **changes)
    assert other.losses[1] == pytest.approx(step_by_hand(family, pipeline_of(family, model), other, changes), rel=2e-5)
    assert other.losses[1] != pytest.approx(plain.losses[1], rel=2e-4)  # ten times the tolerance above


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("trained", [False, True], ids=["encoded ahead", "text encoders trained"])
def test_prior_preservation_is_the_drift_under_the_class_prompt(
    family: str, trained: bool, two_steps: Callable[..., Run], tmp_path: Path
) -> None:
    model = save_model(family, tmp_path / "model")
    plain = two_steps(model, tmp_path / "plain", train_text_encoder=trained)
    prior = {"prior_preservation_weight": 50.0, "prior_prompt": "a dog", "train_text_encoder": trained}
    other = two_steps(model, tmp_path / "other", **prior)
    # A new adapter changes nothing, so there is nothing to hold back in the first step; in the second there is.
    assert other.losses[0] == plain.losses[0]
    assert other.losses[1] > plain.losses[1] * (1 + 2e-4)
    assert other.losses[1] == pytest.approx(step_by_hand(family, pipeline_of(family, model), other, prior), rel=2e-5)
