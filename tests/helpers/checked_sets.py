"""Small data sets to be checked: a clean one of drawn scenes, and what is needed to spoil it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_scripts.builtin.world import canonical_caption, draw, random_scene
from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache
from lora_scripts.data.dataset import open_dataset
from lora_scripts.preflight.findings import Finding, Report
from lora_scripts.preflight.run import check_data

__all__ = ["captions_of", "check", "clean_set", "found", "write_captions"]


def clean_set(folder: Path, number: int = 8, size: int = 128, style: str | None = None) -> dict[str, str]:
    """Fills the folder with drawn scenes; their captions by name, as written to `metadata.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    captions = {}
    for i in range(number):
        scene = random_scene(rng)
        captions[f"{i:02d}.png"] = canonical_caption(scene)
        styled: dict[str, Any] = {"style": style} if style else {}
        draw(scene, i, size=size, **styled).save(folder / f"{i:02d}.png")
    write_captions(folder, captions)
    return captions


def write_captions(folder: Path, captions: Mapping[str, str]) -> None:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["filename", "prompt"], *captions.items()])


def captions_of(folder: Path, change: Callable[[int, str], str]) -> None:
    """Rewrites every caption as `change(position, caption)`."""
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    write_captions(folder, {row["filename"]: change(i, row["prompt"]) for i, row in enumerate(rows)})


def check(folder: Path, cut: Callable[[str], str] | None = None, **settings: Any) -> Report:
    """The data checks on a folder, at 128 px and without a cache unless the settings say otherwise."""
    config = RunConfig.model_validate(
        {"train_data_dir": folder, "base_model": "-", "output_dir": folder / "run", "resolution": 128} | settings
    )
    assert config.resolution is not None
    return check_data(config, open_dataset(config, config.resolution), EncodingCache(config.cache_dir), cut)


def found(report: Report, code: str) -> Finding:
    """The finding of that kind; there must be one and only one."""
    matching = [finding for finding in report.findings if finding.code == code]
    assert len(matching) == 1, [finding.code for finding in report.findings]
    return matching[0]


def spoil(path: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    """Replaces a picture by what `change` makes of it."""
    with Image.open(path) as image:
        changed = change(image.convert("RGB"))
    changed.save(path)
