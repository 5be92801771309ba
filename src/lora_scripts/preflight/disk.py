"""How much a run will write, and whether there is room for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_scripts.adapter_rules import writes_own_kind
from lora_scripts.config import RunConfig, Size
from lora_scripts.export.bake import GROWTH
from lora_scripts.planning.memory_plan import optimizer_bytes
from lora_scripts.preflight.run_length import RunLength

__all__ = ["DiskNeed", "checkpoint_bytes", "encoding_need", "free_bytes", "merge_by_disk", "output_need"]

SAVED_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Per weight of the loadable file."""
OVERHEAD = 100_000
"""Per checkpoint: names and shapes in headers, settings, the manifest."""
ROW = 300
"""Per picture in each checkpoint's state.json: name, digest, caption."""
PREVIEW_BYTES = 2 * 2
"""Per pixel: a PNG of a detailed picture takes about two, once in samples/ and once in TensorBoard's file."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes still to be written under a folder, and what is free there."""

    folder: Path
    num_bytes: int
    free_bytes: int


def checkpoint_bytes(config: RunConfig, num_parameters: int, num_pictures: int) -> int:
    """One `checkpoint-N`: weights in float32, the optimizer's state with their average, and the loadable file of that step."""
    start = 4 if config.lora_init == "pissa" else 0  # where the matrices began is kept too
    per_weight = 4 + start + optimizer_bytes(config) + _file_bytes(config)
    return num_parameters * per_weight + OVERHEAD + ROW * num_pictures


def _file_bytes(config: RunConfig) -> int:
    """Of the loadable file, per trained weight: it has twice the rank after PiSSA, and up to eight times for a baked kind."""
    baked = config.adapter not in ("lora", "locon") and not writes_own_kind(config)
    ranks = GROWTH[-1] if baked else 2 if config.lora_init == "pissa" else 1
    return SAVED_BYTES[config.save_precision] * ranks


def output_need(
    config: RunConfig,
    length: RunLength,
    num_parameters: int,
    num_pictures: int,
    previews: int,
    resolution: Size,
) -> DiskNeed:
    """What checkpoints, the finished file and previews will take in the output folder.

    Args:
        previews: pictures rendered each time.
    """
    saves = -(-length.max_steps // config.save_steps) - length.done // config.save_steps
    if config.keep_checkpoints is not None:
        # One more while the newest is written, and the best one, which is never removed.
        saves = min(saves, config.keep_checkpoints + 2)
    rendered = length.to_do // config.preview_every + 2 if config.preview_every else 0
    num_bytes = (
        max(0, saves) * checkpoint_bytes(config, num_parameters, num_pictures)
        + num_parameters * _file_bytes(config)
        + rendered * previews * resolution[0] * resolution[1] * PREVIEW_BYTES
    )
    return DiskNeed(config.output_dir, num_bytes, free_bytes(config.output_dir))


def encoding_need(folder: Path, num_pictures: int, encoded_bytes: int) -> DiskNeed:
    """What the cache of encodings will grow by: what all pictures take, less what lies there already."""
    present = sum(
        file.stat().st_size for kind in ("latents", "text") for file in (folder / kind).rglob("*.safetensors")
    )
    return DiskNeed(folder, max(0, num_pictures * encoded_bytes - present), free_bytes(folder))


def merge_by_disk(needs: Sequence[DiskNeed]) -> list[DiskNeed]:
    """Needs on one disk added up, since they share its room; the first one's folder names it."""
    merged: dict[int, DiskNeed] = {}
    for need in needs:
        disk = os.stat(_existing(need.folder)).st_dev
        before = merged.get(disk)
        merged[disk] = (
            need
            if before is None
            else DiskNeed(before.folder, before.num_bytes + need.num_bytes, min(before.free_bytes, need.free_bytes))
        )
    return list(merged.values())


def free_bytes(folder: Path) -> int:
    """Free for this user on the disk that will hold the folder, which need not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
