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
from lora_scripts.objectives.errors import huber_thresholds, pseudo_huber
from lora_scripts.objectives.noise import offset_noise, pyramid_noise
from lora_scripts.objectives.weights import debiased_weights, min_snr_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    def drawn(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """All that is random in a pass, on the CPU: "posterior", "noise" and, where more noise is put on than is predicted,
        "added", [B,C,h,w] each; "timesteps" [B].
        """
        keys, shape = batch.keys, batch.tensors["latents_mean"].shape[1:]
        noise = draws.normal(keys, shape, "noise")
        drawn = {"posterior": draws.normal(keys, shape, "posterior"), "timesteps": self._timesteps(batch, draws)}
        if batch.levels is not None:
            return drawn | {"noise": noise}
        noise = self._shaped(noise, keys, draws)
        added = self._perturbed(noise, keys, draws)
        return drawn | {"noise": noise} | ({} if added is noise else {"added": added})

    def noised(self, batch: Batch, draws: Draws) -> Noised:
        """The batch's latents, drawn from their distribution, with noise on them."""
        drawn = batch.tensors if "noise" in batch.tensors else self.drawn(batch, draws)
        posterior, noise, timesteps = (self._on_device(drawn[name]) for name in ("posterior", "noise", "timesteps"))
        added = self._on_device(drawn["added"]) if "added" in drawn else noise
        latents = torch.addcmul(batch.tensors["latents_mean"], batch.tensors["latents_std"], posterior)
        noisy_latents = add_noise(self.schedule, latents, added, timesteps)
        return Noised(noisy_latents, training_target(self.schedule, latents, noise, timesteps), timesteps)

    def _shaped(self, noise: Tensor, keys: Sequence[str], draws: Draws) -> Tensor:
        """The noise [B,C,h,w] that is put on and predicted, from plain noise; on the CPU."""
        config = self._config
        if config.noise_offset:
            noise = offset_noise(noise, draws.normal(keys, (noise.shape[1], 1, 1), "offset"), config.noise_offset)
        if config.pyramid_noise_iterations:
            noise = pyramid_noise(noise, draws, keys, config.pyramid_noise_iterations, config.pyramid_noise_discount)
        return noise

    def _perturbed(self, noise: Tensor, keys: Sequence[str], draws: Draws) -> Tensor:
        """The noise [B,C,h,w] that is put on where that is more than is to be predicted, on the CPU; else `noise` itself.

        Source: Ning et al. 2023, arXiv 2301.11706, algorithm 1.
        """
        strength = self._config.input_perturbation
        if not strength:
            return noise
        return noise + strength * draws.normal(keys, noise.shape[1:], "perturbation")

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

    def drift(self, model_pred: Tensor, frozen_pred: Tensor, noised: Noised) -> Tensor:
        """[] how far a prediction [B,C,h,w] is from the frozen model's for the same input, counted like the loss, summed."""
        errors = self._errors((model_pred.float() - frozen_pred.float()).square(), noised)
        return (errors.mean(dim=(1, 2, 3)) * self._weights(noised)).sum()

    def _errors(self, squared: Tensor, noised: Noised) -> Tensor:
        """[B,C,h,w] what the loss takes for the error of every latent pixel, from its square; `squared` itself for l2."""
        config = self._config
        if config.loss_type == "l2":
            return squared
        thresholds = huber_thresholds(self.schedule, noised.timesteps, config.huber_c, config.huber_schedule)
        return pseudo_huber(squared, thresholds, config.loss_type)

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
        own = batch.tensors.get("weight")
        if "mask" not in batch.tensors or self._config.masked_normalize:
            return own
        covered = self._learnt(batch).mean(dim=(1, 2, 3))
        return covered if own is None else covered * own

    def _weights(self, noised: Noised) -> Tensor:
        """[B] how much the noise level of each picture counts."""
        config, kind = self._config, self.schedule.prediction
        if config.debiased_estimation:
            return debiased_weights(snr(self.schedule, noised.timesteps), kind)
        if config.snr_gamma:
            return min_snr_weights(snr(self.schedule, noised.timesteps), config.snr_gamma, kind)
        return torch.ones_like(noised.timesteps, dtype=torch.float32)

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
