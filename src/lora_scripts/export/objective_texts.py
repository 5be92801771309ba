"""What a file's header says of the loss, beside min-SNR and noise offset: the names that kohya's sd-scripts writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig

__all__ = ["objective_texts"]


def objective_texts(config: RunConfig) -> dict[str, str]:
    """Name in the header -> text, for every such setting; "None" where one is not in force, as sd-scripts has it."""
    huber = config.loss_type != "l2"
    pyramid = config.pyramid_noise_iterations > 0
    values = {
        "ss_debiased_estimation": config.debiased_estimation,
        "ss_loss_type": config.loss_type,
        "ss_huber_c": config.huber_c if huber else None,
        "ss_huber_schedule": config.huber_schedule if huber else None,
        "ss_multires_noise_iterations": config.pyramid_noise_iterations if pyramid else None,
        "ss_multires_noise_discount": config.pyramid_noise_discount if pyramid else None,
        "ss_ip_noise_gamma": config.input_perturbation or None,
        "ss_prior_loss_weight": config.prior_preservation_weight or None,
    }
    return {name: str(value) for name, value in values.items()}
