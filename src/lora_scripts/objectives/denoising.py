"""What a denoiser is asked to learn: noise put on latents, and the loss of what the model makes of them.

The same for every family that predicts noise or velocity; a family only says how its denoiser is called.

Legend for shapes: B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_scripts.families.protocol import Loss
from lora_scripts.objectives.ddpm import (
    NoiseSchedule,
    add_noise,
    sample_timesteps,
    snr,
    training_target,
)
from lora_scripts.objectives.noise import offset_noise
from lora_scripts.objectives.weights import min_snr_weights

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig
    from lora_scripts.families.protocol import Batch
    from lora_scripts.training.draws import Draws

__all__ = ["DenoisingObjective", "Noised"]


SMALLEST_MASK = 1e-6
"""Mean of a mask below which it is empty; its picture's loss is then 0 rather than 0 / 0."""


@dataclass(frozen=True)
class Noised:
    """Latents as the denoiser sees them.

    Attributes:
        noisy_latents: [B,C,h,w].
        target: [B,C,h,w] what it is to predict from them.
        timesteps: [B], 0..T-1.
    """

    noisy_latents: Tensor
    target: Tensor
    timesteps: Tensor


class DenoisingObjective:
    """Noise levels, noise, target and loss, as the config asks for them.

    Attributes:
        schedule: of the noise, on the training device.
    """

    def __init__(self, config: RunConfig, schedule: NoiseSchedule, device: torch.device) -> None:
        self._config, self._device = config, device
        self.schedule = schedule.to(device)

    def noised(self, batch: Batch, draws: Draws) -> Noised:
        """The batch's latents, drawn from their distribution, with noise on them."""
        config, keys = self._config, batch.keys
        mean, std = batch.tensors["latents_mean"], batch.tensors["latents_std"]
        shape = mean.shape[1:]
        latents = torch.addcmul(mean, std, self._on_device(draws.normal(keys, shape, "posterior")))
        noise = self._on_device(draws.normal(keys, shape, "noise"))
        if config.noise_offset and batch.levels is None:
            offsets = self._on_device(draws.normal(keys, (shape[0], 1, 1), "offset"))
            noise = offset_noise(noise, offsets, config.noise_offset)
        timesteps = self._on_device(self._timesteps(batch, draws))
        noisy_latents = add_noise(self.schedule, latents, noise, timesteps)
        return Noised(noisy_latents, training_target(self.schedule, latents, noise, timesteps), timesteps)

    def loss(self, model_pred: Tensor, noised: Noised, batch: Batch) -> Loss:
        """The error of the predicted noise (or velocity) as the config counts it, one number per picture, summed.

        `per_example` is the plain squared error all the same, so that measurements of any two runs can be compared.
        """
        squared = (model_pred.float() - noised.target).square()
        errors = self._errors(squared, noised)
        plain = self._of_picture(squared, batch)
        of_picture = plain if errors is squared else self._of_picture(errors, batch)
        weighted = of_picture * self._weights(noised)
        if (importance := self._importance(batch)) is not None:
            weighted = weighted * importance
        low, high = self._trained_range()
        levels = (noised.timesteps - low + 0.5) / (high - low)
        return Loss(weighted.sum(), len(weighted), plain.detach(), levels)

    def _errors(self, squared: Tensor, noised: Noised) -> Tensor:
        """[B,C,h,w] what the loss takes for the error of every latent pixel, from its square; `squared` itself for l2."""
        return squared

    def _of_picture(self, errors: Tensor, batch: Batch) -> Tensor:
        """[B] the mean of a picture's errors [B,C,h,w]; with a mask, weighted by what is to be learnt of it."""
        if "mask" not in batch.tensors:
            return errors.mean(dim=(1, 2, 3))
        learnt = self._learnt(batch)
        # The weights' own mean is divided out: errors of pictures can be compared, however small their masks.
        return (errors * learnt).mean(dim=(1, 2, 3)) / learnt.mean(dim=(1, 2, 3)).clamp(min=SMALLEST_MASK)

    def _learnt(self, batch: Batch) -> Tensor:
        """[B,1,h,w] how much each latent pixel counts: the mask, but never less than what is left out of it counts.

        Source: Nerogar/OneTrainer, `masked_losses`, which clamps the mask the same way.
        """
        return batch.tensors["mask"].clamp(min=self._config.masked_weight_outside)

    def _importance(self, batch: Batch) -> Tensor | None:
        """[B] how much each picture counts, None where all count alike: its own weight, and with masks that are not
        normalised the mean of its mask, which makes its loss the weighted sum over the number of all latent pixels, as in
        kohya-ss/sd-scripts (`apply_masked_loss`) and OneTrainer.
        """
        own = None if batch.weights is None else torch.tensor(batch.weights, device=self._device)
        if "mask" not in batch.tensors or self._config.masked_normalize:
            return own
        covered = self._learnt(batch).mean(dim=(1, 2, 3))
        return covered if own is None else covered * own

    def _weights(self, noised: Noised) -> Tensor:
        """[B] how much the noise level of each picture counts."""
        if not self._config.min_snr_gamma:
            return torch.ones_like(noised.timesteps, dtype=torch.float32)
        ratio = snr(self.schedule, noised.timesteps)
        return min_snr_weights(ratio, self._config.min_snr_gamma, self.schedule.prediction)

    def _timesteps(self, batch: Batch, draws: Draws) -> Tensor:
        """[B] as drawn, or as the batch prescribes them."""
        low, high = self._trained_range()
        if batch.levels is not None:
            return torch.tensor([min(low + int(level * (high - low)), high - 1) for level in batch.levels])
        strata = batch.strata if self._config.timestep_sampling == "stratified" else None
        return sample_timesteps(draws, batch.keys, self.schedule.num_train_timesteps, low=low, high=high, strata=strata)

    def _trained_range(self) -> tuple[int, int]:
        """The noise levels that are trained, as (lowest timestep, highest + 1)."""
        return self._config.min_timestep, min(self._config.max_timestep + 1, self.schedule.num_train_timesteps)

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)
