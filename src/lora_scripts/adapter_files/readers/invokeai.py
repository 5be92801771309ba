"""InvokeAI: kohya names only; for SDXL either the original's or those of diffusers, never both."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lora_scripts.adapter_files.readers.accepted import accepted_names
from lora_scripts.adapter_files.readers.verdict import (
    TO_KOHYA,
    Verdict,
    half_a_layer,
    left_out,
    refused_kind,
    unknown_layers,
)
from lora_scripts.adapter_files.reference import original_names

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = ["InvokeAI"]

_SDXL_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "bundle_emb")


class InvokeAI:
    """Source: invoke-ai/InvokeAI, `backend/patches/lora_conversions/sdxl_lora_conversion_utils.py`, `layers/utils.py`."""

    title: ClassVar[str] = "InvokeAI"
    _KINDS = ("lora", "dora", "tucker", "loha", "lokr", "full", "ia3", "norm")

    def takes(self, file: AdapterFile) -> Verdict:
        assert file.architecture is not None
        if verdict := refused_kind(self.title, file, self._KINDS):
            return verdict
        if verdict := half_a_layer(self.title, file):
            return verdict
        if file.architecture == "sdxl" and (verdict := self._sdxl(file)):
            return verdict
        if unknown := unknown_layers(file, accepted_names("invokeai", file.architecture)):
            return left_out(self.title, file, unknown)
        return Verdict(self.title, True)

    def _sdxl(self, file: AdapterFile) -> Verdict | None:
        names = [layer.file_name for layer in file.layers.values()] + list(file.strangers)
        strange = next((name for name in names if not name.startswith(_SDXL_PREFIXES)), None)
        if strange is not None:
            reason = f"it refuses a file of SDXL in which a key begins otherwise than lora_unet_, lora_te1_ or lora_te2_: {strange}"
            return Verdict(self.title, False, reason, f"write the names anew: {TO_KOHYA}")
        original = original_names("sdxl")
        paths = [name.removeprefix("lora_unet_") for name in names if name.startswith("lora_unet_")]
        if len({path in original for path in paths}) > 1:
            odd = next(path for path in paths if path not in original)
            reason = f"it refuses a file in which the original's names and others are mixed: lora_unet_{odd}"
            return Verdict(self.title, False, reason, f"write the names anew: {TO_KOHYA}")
        return None
