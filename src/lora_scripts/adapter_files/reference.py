"""The layers of Stable Diffusion 1.5, 2 and SDXL as data: names, shapes and kohya names, without building any model.

With them kohya's underscores can be undone, and a file checked, where no base model is at hand.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from lora_scripts.adapter_files.owners import underscored
from lora_scripts.export.names import split_layer

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ARCHITECTURES", "ReferenceLayer", "kohya_names", "original_names", "reference_layers"]

ARCHITECTURES = ("sd15", "sd2", "sdxl")


@dataclass(frozen=True)
class ReferenceLayer:
    """One linear or convolution layer of a published model.

    Attributes:
        layer: component in front, CLIP's under `text_model` as files spell it: `text_encoder.text_model.encoder.layers.0...`.
        shape: of its weight, [out, in] or [out, in, k, k].
        kohya: its name in a kohya file, empty where no reader takes one.
        original: its path in the original U-Net, `input_blocks.4.1.proj_in`; empty for a text encoder.
    """

    layer: str
    shape: tuple[int, ...]
    kohya: str
    original: str


@cache
def reference_layers(architecture: str) -> Mapping[str, ReferenceLayer]:
    """Every layer of a published model, by name; architecture is one of ARCHITECTURES."""
    data = files("lora_scripts.adapter_files").joinpath("tables", f"{architecture}.tsv.gz").read_bytes()
    rows = (line.split("\t") for line in gzip.decompress(data).decode("utf-8").splitlines())
    layers = (ReferenceLayer(name, tuple(map(int, shape.split("x"))), *names) for name, shape, *names in rows)
    return {row.layer: row for row in layers}


@cache
def kohya_names(architecture: str) -> Mapping[str, str]:
    """Layer -> its name in a kohya file, for the layers that one has a place for."""
    return {name: row.kohya for name, row in reference_layers(architecture).items() if row.kohya}


def original_names(architecture: str) -> Mapping[str, str]:
    """Path in the original U-Net with `_` for `.` -> path in the diffusers class."""
    rows = reference_layers(architecture).items()
    return {underscored(row.original): split_layer(name)[1] for name, row in rows if row.original}
