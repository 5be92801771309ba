"""ComfyUI: the most spellings of all; what it does not know it passes over with a line in the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lora_scripts.adapter_files.readers.accepted import accepted_names
from lora_scripts.adapter_files.readers.verdict import (
    Verdict,
    half_a_layer,
    left_out,
    refused_kind,
    unknown_layers,
    wrong_strength,
)

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = ["ComfyUI"]


class ComfyUI:
    """Source: comfyanonymous/ComfyUI, `comfy/lora.py` and `comfy/weight_adapter/`."""

    title: ClassVar[str] = "ComfyUI"
    _KINDS = ("lora", "dora", "tucker", "loha", "lokr", "oft", "full", "glora", "norm")

    def takes(self, file: AdapterFile) -> Verdict:
        assert file.architecture is not None
        if verdict := refused_kind(self.title, file, self._KINDS):
            return verdict
        if verdict := half_a_layer(self.title, file):
            return verdict
        if unknown := unknown_layers(file, accepted_names("comfyui", file.architecture)):
            return left_out(self.title, file, unknown)
        if verdict := wrong_strength(self.title, file):
            return verdict
        return Verdict(self.title, True)
