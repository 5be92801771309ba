"""The table of model families; a new one is a file and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_scripts.models.quantised import num_weights

if TYPE_CHECKING:
    from lora_scripts.families.protocol import ModelFamily

__all__ = ["FAMILIES", "family_class", "num_parameters"]

FAMILIES = {
    "sd15": "lora_scripts.families.sd15:StableDiffusion15",
    "sd2": "lora_scripts.families.sd2:StableDiffusion2",
    "sdxl": "lora_scripts.families.sdxl:StableDiffusionXL",
    "causal_lm": "lora_scripts.families.causal_lm:CausalLanguageModel",
}


def family_class(name: str) -> type[Any]:
    """The class behind a family's name, imported on demand because it brings torch and diffusers with it.

    Raises:
        KeyError: no such family.
    """
    module, _, attribute = FAMILIES[name].partition(":")
    family: type[Any] = getattr(import_module(module), attribute)
    return family


def num_parameters(family: ModelFamily) -> int:
    """All weights of the components that can be adapted."""
    return sum(num_weights(module) for module in family.components.values())
