"""The table of model families; a new one is a file and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.families.protocol import ModelFamily

__all__ = ["FAMILIES", "family_class"]

FAMILIES = {
    "sd15": "lora_scripts.families.sd15:StableDiffusion15",
}


def family_class(name: str) -> type[ModelFamily]:
    """The class behind a family's name, imported on demand because it brings torch and diffusers with it.

    Raises:
        KeyError: no such family.
    """
    module, _, attribute = FAMILIES[name].partition(":")
    family: type[ModelFamily] = getattr(import_module(module), attribute)
    return family
