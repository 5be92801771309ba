"""AUTOMATIC1111's WebUI: names without dots, and a header that says the model, or the file is not shown."""

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

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = ["Automatic1111"]


class Automatic1111:
    """Source: AUTOMATIC1111/stable-diffusion-webui, `extensions-builtin/Lora/networks.py` and `network.py`."""

    title: ClassVar[str] = "AUTOMATIC1111"
    _KINDS = ("lora", "dora", "tucker", "loha", "lokr", "oft", "full", "glora", "ia3", "norm")

    def takes(self, file: AdapterFile) -> Verdict:
        assert file.architecture is not None
        if verdict := refused_kind(self.title, file, self._KINDS):
            return verdict
        if verdict := half_a_layer(self.title, file):
            return verdict
        unknown = unknown_layers(file, accepted_names("a1111", file.architecture))
        if unknown:
            return left_out(self.title, file, unknown)
        shown_for = _shown_for(file.metadata)
        if shown_for not in (file.architecture, ""):
            return Verdict(
                self.title,
                False,
                f"its header does not say {file.title}, so the Lora tab hides it (a typed <lora:{file.name}:1> works)",
                f"write the header anew: {TO_KOHYA}",
            )
        return Verdict(self.title, True)


def _shown_for(header: Mapping[str, str]) -> str:
    """The models whose tab shows the file; empty for all."""
    if not header:
        return ""
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    return "sd2" if header.get("ss_v2") == "True" else "sd15"
