"""Forge: ComfyUI's names; a file with more than a dozen unknown keys is dropped whole."""

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
    wrong_strength,
)

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = ["Forge"]

_MOST_UNKNOWN_KEYS = 12


class Forge:
    """Source: lllyasviel/stable-diffusion-webui-forge, `extensions-builtin/sd_forge_lora/networks.py`."""

    title: ClassVar[str] = "Forge"
    _KINDS = ("lora", "dora", "tucker", "loha", "lokr", "full", "glora", "norm")

    def takes(self, file: AdapterFile) -> Verdict:
        assert file.architecture is not None
        if verdict := refused_kind(self.title, file, self._KINDS):
            return verdict
        if verdict := half_a_layer(self.title, file):
            return verdict
        unknown = unknown_layers(file, accepted_names("comfyui", file.architecture))
        names = set(unknown)
        keys = sum(len(layer.parts) for layer in file.layers.values() if layer.file_name in names) + len(file.strangers)
        if keys > _MOST_UNKNOWN_KEYS:
            return Verdict(
                self.title,
                False,
                f"it drops the whole file, as {keys} of its keys are unknown there (more than {_MOST_UNKNOWN_KEYS})",
                f"write the names anew: {TO_KOHYA}",
            )
        if unknown:
            return left_out(self.title, file, unknown)
        if verdict := wrong_strength(self.title, file):
            return verdict
        version = file.metadata.get("ss_base_model_version", "") + " " + file.metadata.get("modelspec.architecture", "")
        if (
            file.architecture == "sdxl"
            and file.metadata
            and not ("sdxl_" in version or "stable-diffusion-xl" in version)
        ):
            return Verdict(
                self.title,
                False,
                "its header does not say SDXL, so the tab hides it under the preset xl",
                f"write the header anew: {TO_KOHYA}",
            )
        return Verdict(self.title, True)
