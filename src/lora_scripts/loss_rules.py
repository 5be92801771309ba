"""Rules between the settings of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_scripts.config import RunConfig

__all__ = ["loss_faults"]


def loss_faults(config: RunConfig, inert: Callable[[str, str], None]) -> list[str]:
    """What is wrong, one line each; what merely has no effect is told to `inert(setting, reason)`."""
    faults = []
    if config.debiased_estimation and config.min_snr_gamma:
        inert("min_snr_gamma", "debiased_estimation is true, and noise levels are weighed in one way")
    if config.loss_type == "l2":
        for setting in ("huber_c", "huber_schedule"):
            inert(setting, "loss_type is l2")
    if not config.pyramid_noise_iterations:
        inert("pyramid_noise_discount", "pyramid_noise_iterations is 0")
    if not config.prior_preservation_weight:
        inert("prior_prompt", "prior_preservation_weight is 0")
    elif config.prior_prompt is None:
        faults.append(
            "prior_preservation_weight: needs prior_prompt, the class that is to stay as it was: prior_prompt: a dog, say."
        )
    else:
        held = config.prior_prompt.lower()
        faults += [
            f"prior_prompt: holds the trigger word {word!r}, and what it means would be kept from being learnt. "
            "Write the class alone: a dog, where a sks dog is trained."
            for word in config.triggers
            if word.lower() in held
        ]
    if config.min_timestep > config.max_timestep:
        faults.append(f"min_timestep: {config.min_timestep} is above max_timestep ({config.max_timestep}).")
    if config.zero_terminal_snr and config.prediction == "epsilon":
        faults.append("zero_terminal_snr: needs prediction: v_prediction; pure noise holds no epsilon to predict.")
    return faults
