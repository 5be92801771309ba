"""Small sets of random pictures that a small random BLIP captions, and what a person does to the table."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_scripts.captioners.label import LabelOptions, LabelResult, label

__all__ = ["Notes", "draw", "edit", "rows", "run"]


class Notes:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.total = self.done = 0

    def note(self, text: str) -> None:
        self.texts.append(text)

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, count: int) -> None:
        self.done += count


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(path)


def run(options: LabelOptions, **changes: Any) -> LabelResult:
    return label(replace(options, **changes), Notes())


def rows(options: LabelOptions) -> dict[str, str]:
    with options.output.open(encoding="utf-8-sig", newline="") as file:
        return {row["filename"]: row["prompt"] for row in csv.DictReader(file)}


def edit(options: LabelOptions, **texts: str | None) -> None:
    """Change rows as a person in an editor would; None deletes a row."""
    table = rows(options)
    for stem, text in texts.items():
        if text is None:
            del table[f"{stem}.png"]
        else:
            table[f"{stem}.png"] = text
    with options.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerows([("filename", "prompt"), *table.items()])
