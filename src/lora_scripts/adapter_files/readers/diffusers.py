"""diffusers: kohya files without any leftover, or its own spelling."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from lora_scripts.adapter_files.readers.accepted import accepted_names
from lora_scripts.adapter_files.readers.verdict import (
    TO_KOHYA,
    TO_PLAIN,
    Verdict,
    half_a_layer,
    refused_kind,
    unknown_layers,
)

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = ["Diffusers"]

_ATTENTION = re.compile(r"\.to_(q|k|v|out\.0)$")
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")


class Diffusers:
    """Source: huggingface/diffusers, `loaders/lora_pipeline.py` and `loaders/lora_conversion_utils.py`."""

    title: ClassVar[str] = "diffusers"

    def takes(self, file: AdapterFile) -> Verdict:
        assert file.architecture is not None
        spelling = file.spelling
        if verdict := refused_kind(self.title, file, ("lora", "dora")):
            return verdict
        if "dora" in file.kinds and spelling == "kohya":
            reason = "it drops the row lengths of a DoRA in a kohya file and applies the rest, which is another change"
            return Verdict(self.title, False, reason, f"turn it into a plain LoRA: {TO_PLAIN}")
        if verdict := half_a_layer(self.title, file):
            return verdict
        if spelling in ("peft", "native"):
            reason = "it looks for names that begin with unet. or text_encoder., or for kohya's"
            return Verdict(
                self.title, False, reason, "lora-scripts convert FILE --to diffusers --output NEW.safetensors"
            )
        names = [layer.file_name for layer in file.layers.values()] + list(file.strangers)
        mixed = next((name for name in names if not name.startswith(_KOHYA)), None)
        if spelling == "kohya" and mixed is not None:
            reason = (
                f"it takes a file for kohya's only if every key begins with {', '.join(_KOHYA)}; this one has {mixed}"
            )
            return Verdict(self.title, False, reason, f"write the names anew: {TO_KOHYA}")
        if unknown := unknown_layers(file, accepted_names("diffusers", file.architecture)):
            shown = ", ".join(unknown[:3])
            return Verdict(
                self.title,
                False,
                f"it stops at names that it does not know: {shown}",
                f"write the names anew: {TO_KOHYA}",
            )
        if spelling == "kohya" and (lost := _lost_alphas(file)):
            return Verdict(
                self.title,
                False,
                f"it takes one alpha for many layers of a kohya file, so {len(lost)} get the wrong strength: {lost[0]}",
                "lora-scripts convert FILE --to diffusers --output NEW.safetensors",
            )
        return Verdict(self.title, True)


def _lost_alphas(file: AdapterFile) -> list[str]:
    """Layers whose alpha it loses on its way from kohya's names: it falls back to the commonest of the component.

    Seen of diffusers 0.42 with PEFT 0.21: the U-Net's attention layers and the first text encoder.
    """
    lost = []
    for component in file.components:
        layers = [layer for layer in file.layers.values() if layer.component == component]
        commonest = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
        loses = component == "text_encoder"
        lost += [
            layer.file_name for layer in layers if layer.alpha != commonest and (loses or _ATTENTION.search(layer.name))
        ]
    return lost
