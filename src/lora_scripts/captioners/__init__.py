"""Writing captions: the table of captioners. A new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from lora_scripts.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    from lora_scripts.captioners.protocol import Captioner

__all__ = ["CAPTIONERS", "captioner_class"]

CAPTIONERS: Mapping[str, str] = {
    "blip": "lora_scripts.captioners.blip:Blip",
    "clip-blip": "lora_scripts.captioners.clip_rerank:ClipBlip",
}
"""Name after --captioner -> module:class. Strings, because importing a captioner brings torch."""


def captioner_class(name: str) -> type[Captioner]:
    """The class behind a name of the table.

    Raises:
        ModelError: there is no such captioner.
    """
    if name not in CAPTIONERS:
        raise ModelError(
            f"--captioner {name}: no such captioner.{did_you_mean(name, CAPTIONERS)} There are: {', '.join(CAPTIONERS)}."
        )
    module, _, attribute = CAPTIONERS[name].partition(":")
    found: type[Captioner] = getattr(import_module(module), attribute)
    return found
