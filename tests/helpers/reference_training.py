"""A training step put together from diffusers' own parts, as its example scripts do; and families loaded for such comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.nn import functional as F

from lora_scripts.config import RunConfig
from lora_scripts.data.buckets import Framing, fit_into
from lora_scripts.families import family_class
from lora_scripts.families.protocol import Batch
from lora_scripts.models.source import resolve_base_model
from lora_scripts.training.draws import Draws

KEYS = ("0/0/a", "0/0/b", "1/0/a", "1/0/b")
CAPTIONS = ("a red cat on the beach", "", "two blue sailboats " * 30, "a fox, snow")
SIZES = ((700, 900), (64, 64), (200, 120), (96, 64))


def load_family(folder: Path, **changes: Any) -> Any:
    """The family of a model folder, in float32 on the CPU."""
    values = {"train_data_dir": "none", "base_model": str(folder), "output_dir": "none", "resolution": 64}
    config = RunConfig.model_validate({**values, **changes})
    source = resolve_base_model(config.base_model)
    family = family_class(source.family).load(source, config, torch.device("cpu"), torch.float32)
    family._parts.read_rest()  # encoders, which a run reads when there is something to encode
    return family


def encoded(family: Any, pixels: torch.Tensor) -> Batch:
    """Four pictures with their captions and sizes, through the family's encoders."""
    framings = [Framing(size, fit_into(size, [(64, 64)])) for size in SIZES]
    inputs: dict[str, Sequence[Any]] = {"image": list(pixels), "caption": CAPTIONS, "fit": framings}
    rows: list[dict[str, torch.Tensor]] = [{} for _ in KEYS]
    for encoder in family.encoders():
        for row, tensors in zip(rows, encoder.run(inputs[encoder.reads]), strict=True):
            row.update(tensors)
    return Batch({key: torch.stack([row[key] for row in rows]) for key in rows[0]}, CAPTIONS, KEYS)


def part_of(batch: Batch, start: int, end: int) -> Batch:
    return Batch(
        {name: tensor[start:end] for name, tensor in batch.tensors.items()},
        batch.captions[start:end],
        batch.keys[start:end],
    )


def reference_loss(
    pipeline: Any,
    batch: Batch,
    draws: Draws,
    conditions: dict[str, Any],
    *,
    prediction: str,
    gamma: float = 0.0,
    zero_snr: bool = False,
) -> torch.Tensor:
    """[] the summed loss of the batch's latents under the pipeline's U-Net, for the random numbers of `draws`."""
    scheduler = DDPMScheduler.from_config(
        pipeline.scheduler.config, prediction_type=prediction, rescale_betas_zero_snr=zero_snr
    )
    shape = batch.tensors["latents_mean"].shape[1:]
    spread = batch.tensors["latents_std"] * draws.normal(batch.keys, shape, "posterior")
    latents = batch.tensors["latents_mean"] + spread
    noise = draws.normal(batch.keys, shape, "noise")
    timesteps = draws.integers(batch.keys, 0, 1000, "timestep")
    answer = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, **conditions).sample
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    losses = F.mse_loss(answer, target, reduction="none").mean(dim=(1, 2, 3))
    if gamma:
        ratio = compute_snr(scheduler, timesteps)
        losses = losses * ratio.clamp(max=gamma) / (ratio if prediction == "epsilon" else ratio + 1)
    return losses.sum()
