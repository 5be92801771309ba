"""Two small classifiers that read the scene world's attributes and styles from pictures.

They judge what the built-in models draw: in the demo, in the measurements, in tests. Both are convolutional
networks of one design, the second narrower. Legend: B pictures, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_scripts.builtin.weights import builtin_path
from lora_scripts.builtin.world import ATTRIBUTES, STYLES

__all__ = ["LOOKS", "PLAIN", "Judges", "Reader", "load_judges", "to_pixel_values"]

PLAIN = "plain"
LOOKS: tuple[str, ...] = (PLAIN, *STYLES)
"""What the style classifier can answer: the base models' own look, or one of the styles."""

_SIZE = 128
_WIDTHS = (24, 48, 80, 128)
_STYLE_WIDTHS = (16, 24, 32, 48)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Stage(nn.Module):
    """Halves height and width, then refines with a residual convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shrink = _convolution(inputs, outputs, 3, 2)
        self.refine = _convolution(outputs, outputs, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(x)
        refined: Tensor = self.refine(x)
        return x + refined


class Reader(nn.Module):
    """[B,3,128,128] in [-1,1] to one row of logits per head.

    Args:
        heads: name of the head -> number of its classes.
        widths: channels at 64, 32, 16 and 8 pixels' width.
    """

    def __init__(self, heads: dict[str, int], widths: tuple[int, ...] = _WIDTHS) -> None:
        super().__init__()
        self.stem = _convolution(3, widths[0], 5, 2)
        self.stages = nn.Sequential(*(_Stage(a, b) for a, b in pairwise(widths)))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * widths[-1], n) for name, n in heads.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.stages(self.stem(x))
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}


def to_pixel_values(images: Sequence[Image.Image]) -> Tensor:
    """[B,3,128,128] in [-1,1] from pictures of any size; they are scaled, not cut."""
    rows = []
    for image in images:
        picture = image.convert("RGB")
        if picture.size != (_SIZE, _SIZE):
            picture = picture.resize((_SIZE, _SIZE), Image.Resampling.LANCZOS)
        rows.append(np.asarray(picture, np.float32))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).div_(127.5).sub_(1.0)


@dataclass
class Judges:
    """The two classifiers, ready to use."""

    attributes: Reader
    styles: Reader
    batch_size: int = 64

    @torch.inference_mode()
    def _probabilities(self, reader: Reader, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in reader.heads}
        for start in range(0, len(images), self.batch_size):
            pixel_values = to_pixel_values(images[start : start + self.batch_size])
            for name, logits in reader(pixel_values).items():
                parts[name].append(logits.softmax(1))
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def read_attributes(self, images: Sequence[Image.Image]) -> list[dict[str, str | int]]:
        """For each picture its subject, colour, place, time and count, in any of the world's styles."""
        if not images:
            return []
        read = {kind: p.argmax(1).tolist() for kind, p in self._probabilities(self.attributes, images).items()}
        return [{kind: ATTRIBUTES[kind][rows[i]] for kind, rows in read.items()} for i in range(len(images))]

    def style_probabilities(self, images: Sequence[Image.Image]) -> list[dict[str, float]]:
        """For each picture the probability of every look in `LOOKS`."""
        if not images:
            return []
        rows = self._probabilities(self.styles, images)["style"].tolist()
        return [dict(zip(LOOKS, row, strict=True)) for row in rows]

    def read_style(self, images: Sequence[Image.Image]) -> list[str]:
        """For each picture the likeliest look: "plain" or one of the world's styles."""
        return [max(row, key=row.__getitem__) for row in self.style_probabilities(images)]


def attribute_reader() -> Reader:
    """An untrained classifier with one head per kind of attribute."""
    return Reader({kind: len(values) for kind, values in ATTRIBUTES.items()})


def style_reader() -> Reader:
    """An untrained classifier of looks."""
    return Reader({"style": len(LOOKS)}, _STYLE_WIDTHS)


def load_judges(folder: Path | None = None) -> Judges:
    """The trained classifiers, from `folder` or from the built-in weights.

    Raises:
        ModelError: the built-in weights are not installed.
        ValueError: the weights were made for other attributes or styles than this version of the world has.
    """
    folder = folder or builtin_path("judges")
    made_for = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ours = {"attributes": {kind: list(values) for kind, values in ATTRIBUTES.items()}, "looks": list(LOOKS)}
    if made_for != ours:
        raise ValueError(f"{folder}: these classifiers were trained for other attributes or styles: {made_for}")
    readers = []
    for name, reader in (("attributes", attribute_reader()), ("styles", style_reader())):
        weights = load_file(folder / f"{name}.safetensors")
        reader.load_state_dict(
            {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
        )
        readers.append(reader.eval().requires_grad_(False))
    attributes, styles = readers
    return Judges(attributes, styles)
