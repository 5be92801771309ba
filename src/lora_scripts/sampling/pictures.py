"""Rendered pictures on the disk: numbered as the WebUI numbers them, never over an existing one, with their origin inside."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lora_scripts.errors import DataError
from lora_scripts.sampling.infotext import format_infotext, save_png

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.families.protocol import SampleRequest
    from lora_scripts.models.source import BaseModel

__all__ = ["Origin", "check_folder", "lora_hash", "save_grid", "save_picture"]

_PICTURE = re.compile(r"(\d{5,})-")
_GRID = re.compile(r"grid-(\d{4,})\.png")


@dataclass(frozen=True)
class Origin:
    """What all pictures of one call share.

    Attributes:
        model_hash: the WebUI's short hash of a single file; a folder has none.
    """

    model: str
    model_hash: str
    sampler: str
    clip_skip: int

    @classmethod
    def of(cls, source: BaseModel, sampler: str, clip_skip: int) -> Self:
        from lora_scripts.models.hashes import file_sha256

        digest = file_sha256(source.path)[:10] if source.kind == "single_file" else ""
        return cls(source.title, digest, sampler, clip_skip)


def check_folder(folder: Path) -> None:
    """Makes the folder, so that a place that cannot be written is refused before hours of rendering.

    Raises:
        DataError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output {folder}: cannot be made ({error.strerror}). Choose another folder.") from None
    if not os.access(folder, os.W_OK):
        raise DataError(f"--output {folder}: cannot be written. Check its permissions or choose another folder.")


def save_picture(
    folder: Path,
    image: Image,
    request: SampleRequest,
    prompt: str,
    origin: Origin,
    lora_hashes: Mapping[str, str],
) -> Path:
    """Writes `00012-42.png`, the next free number and the seed; its path.

    Args:
        prompt: as it goes into the picture, LoRA tags included.
        lora_hashes: LoRA name to SHA-256 of its tensor part.
    Raises:
        DataError: the folder cannot be written.
    """
    text = format_infotext(
        prompt,
        request.negative_prompt,
        steps=request.steps,
        sampler=origin.sampler,
        guidance=request.guidance,
        seed=request.seed,
        width=request.width,
        height=request.height,
        model=origin.model,
        model_hash=origin.model_hash,
        clip_skip=origin.clip_skip,
        lora_hashes=lora_hashes,
    )
    path = _claim(folder, _PICTURE, lambda number: f"{number:05d}-{request.seed}.png")
    return _save(image, path, text)


def save_grid(folder: Path, image: Image, text: str) -> Path:
    """Writes `grid-0003.png` with a text inside; its path.

    Raises:
        DataError: the folder cannot be written.
    """
    return _save(image, _claim(folder, _GRID, lambda number: f"grid-{number:04d}.png"), text)


def lora_hash(path: Path, metadata: Mapping[str, str]) -> str:
    """SHA-256 of a LoRA file's tensor part, from its header or else counted."""
    if metadata.get("sshs_model_hash"):
        return metadata["sshs_model_hash"]
    if path.is_dir():
        path = min(path.rglob("*.safetensors"))
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _claim(folder: Path, pattern: re.Pattern[str], name: Callable[[int], str]) -> Path:
    """The next free numbered name, taken at once, so that no picture is overwritten by another run either."""
    numbers = [int(match[1]) for entry in folder.iterdir() if (match := pattern.match(entry.name))]
    number = max(numbers, default=-1) + 1
    while True:
        path = folder / name(number)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}). Choose another folder.") from None
        return path


def _save(image: Image, path: Path, text: str) -> Path:
    try:
        save_png(image, path, text)
    except BaseException:
        path.unlink(missing_ok=True)  # the empty file that held the name
        raise
    return path
