"""The denoising objective of Stable Diffusion 1 and 2 and SDXL: noise, targets and weights as pure functions.

Legend for shapes: B batch, C channels, h w latent height and width, T number of training timesteps.
Source: Ho et al. 2020, arXiv 2006.11239; names and values as diffusers' `DDPMScheduler`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_scripts.training.draws import Draws

__all__ = [
    "NoiseSchedule",
    "Prediction",
    "add_noise",
    "sample_timesteps",
    "snr",
    "training_target",
    "zero_terminal_snr",
]

Prediction: TypeAlias = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of a picture is left at every timestep.

    Attributes:
        alphas_cumprod: [T] float32, the squared share of the picture; falls from nearly 1 to nearly 0.
        prediction: what the model predicts.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, prediction: Prediction | None = None, zero_snr: bool | None = None
    ) -> NoiseSchedule:
        """The schedule of a diffusers `scheduler_config.json`, of whichever scheduler class.

        Args:
            prediction: overrides `prediction_type`.
            zero_snr: overrides `rescale_betas_zero_snr`.
        Raises:
            ModelError: a beta schedule or prediction type that is not known.
        """
        betas = _betas(config)
        if config.get("rescale_betas_zero_snr", False) if zero_snr is None else zero_snr:
            betas = zero_terminal_snr(betas)
        kind = prediction or config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"scheduler_config.json: prediction_type {kind!r} cannot be trained; known: epsilon, v_prediction."
            )
        return cls(torch.cumprod(1.0 - betas, dim=0), kind)

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same schedule with its table on a device, so that looking up a timestep moves nothing."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))


def _betas(config: Mapping[str, Any]) -> Tensor:
    """[T] float32, the variance added at every timestep."""
    num = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    match config.get("beta_schedule", "linear"):
        case "linear":
            return torch.linspace(start, end, num, dtype=torch.float32)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float32) ** 2
        case "squaredcos_cap_v2":
            # Nichol and Dhariwal 2021, arXiv 2102.09672, equation 17, each beta capped at 0.999.
            bars = [math.cos((i / num + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num + 1)]
            capped = [min(1.0 - bars[i + 1] / bars[i], 0.999) for i in range(num)]
            return torch.tensor(capped, dtype=torch.float32)
        case unknown:
            raise ModelError(
                f"scheduler_config.json: beta_schedule {unknown!r} is not known; "
                "known: linear, scaled_linear, squaredcos_cap_v2."
            )


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """[T] betas stretched so that nothing of the picture is left at the last timestep.

    Source: Lin et al. 2023, arXiv 2305.08891, algorithm 1.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    bars = root**2
    alphas = torch.cat([bars[:1], bars[1:] / bars[:-1]])
    return 1.0 - alphas


def sample_timesteps(
    draws: Draws,
    keys: Sequence[str],
    num_train_timesteps: int,
    *,
    low: int = 0,
    high: int | None = None,
    strata: Sequence[tuple[float, float]] | None = None,
) -> Tensor:
    """[B] int64 on the CPU, uniform in low ... high - 1.

    Args:
        strata: each draw's part of the range, as (start, width) in 0..1, going on at 0 beyond 1. When the parts of a step
            cover the range evenly, its mean loss and gradient scatter less and stay as they are on average. None: one
            independent draw per key.
    Source: Kingma et al. 2021, arXiv 2107.00630, appendix I.1 (low-discrepancy sampler).
    """
    high = num_train_timesteps if high is None else high
    if strata is None:
        return draws.integers(keys, low, high, "timestep")
    start, width = torch.tensor(strata, dtype=torch.float64).unbind(1)
    position = (start + width * draws.uniform(keys, "timestep").double()) % 1.0
    return (low + position * (high - low)).long().clamp_(max=high - 1)


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Noisy latents [B,C,h,w]: sqrt(a) * latents + sqrt(1 - a) * noise.

    The two factors are taken in float32 and the result in the dtype of `latents`; half-precision factors would shift
    the noise level of late timesteps.
    """
    signal, sigma = _shares(schedule, timesteps, latents)
    return torch.addcmul(signal * latents, sigma, noise)


def training_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model should answer, [B,C,h,w]: the noise, or the velocity sqrt(a) * noise - sqrt(1 - a) * latents.

    Source: Salimans and Ho 2022, arXiv 2202.00512, appendix D.
    """
    if schedule.prediction == "epsilon":
        return noise
    signal, sigma = _shares(schedule, timesteps, latents)
    return torch.addcmul(signal * noise, sigma, latents, value=-1)


def snr(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """[B] float32, (alpha_t / sigma_t)**2: a plain ratio rather than decibels; 0 at a zero terminal."""
    share = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    return share / (1.0 - share)


def _shares(schedule: NoiseSchedule, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) at the timesteps, [B,1,1,1], in the dtype and on the device of `like`."""
    share = schedule.alphas_cumprod.to(like.device)[timesteps.to(like.device)]
    share = share.reshape(-1, *[1] * (like.ndim - 1))
    return share.sqrt().to(like.dtype), (1.0 - share).sqrt().to(like.dtype)
