"""The folders that a run's pictures come from, each with its settings in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import DataError

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig

__all__ = ["PictureSource", "folders_inside", "picture_sources", "require_folders", "source_of"]


@dataclass(frozen=True)
class PictureSource:
    """A folder of pictures, with what the run's settings leave to it filled in.

    Attributes:
        where: how messages call it.
        name: what people know it by; no two have the same.
        prefix: what its pictures' names begin with; empty for `train_data_dir`.
        caption: for pictures that have none of their own.
        weight: how much its pictures count in the loss.
        mask_dir: where masks named like its pictures are; None for masks beside them.
        regularization: its pictures keep what the model knows; they are not what is to be learnt.
    """

    where: str
    path: Path
    name: str
    prefix: str
    metadata_path: Path | None
    repeats: int
    trigger_word: str | None
    caption: str = ""
    weight: float = 1.0
    regularization: bool = False
    mask_dir: Path | None = None


def picture_sources(config: RunConfig) -> list[PictureSource]:
    """`train_data_dir` first, then `folders` in their order."""
    sources = []
    taken: set[str] = {folder.name for folder in config.folders if folder.name}
    if config.train_data_dir is not None:
        name = _free(config.train_data_dir.resolve().name, taken)
        sources.append(
            PictureSource(
                "train_data_dir",
                config.train_data_dir,
                name,
                "",
                config.metadata_path,
                config.repeats,
                config.trigger_word,
                mask_dir=config.mask_dir,
            )
        )
    for number, folder in enumerate(config.folders, start=1):
        name = folder.name or _free(folder.path.resolve().name, taken)
        repeats, trigger_word = folder.repeats, folder.trigger_word
        if repeats is None:
            repeats = 1 if folder.regularization else config.repeats
        if trigger_word is None and not folder.regularization:
            trigger_word = config.trigger_word
        sources.append(
            PictureSource(
                f"folders entry {number}",
                folder.path,
                name,
                f"{name}/",
                folder.metadata_path,
                repeats,
                trigger_word or None,
                folder.caption or "",
                folder.weight,
                folder.regularization,
                folder.mask_dir,
            )
        )
    return sources


def require_folders(config: RunConfig) -> list[PictureSource]:
    """The folders of pictures. Cheap, so it is asked before weights are read.

    Raises:
        DataError: some are not there; all of them are named.
    """
    sources = picture_sources(config)
    faults = [
        f"{source.where}: {source.path}: no such folder. Put the pictures there, or correct the path."
        for source in sources
        if not source.path.is_dir()
    ]
    for source in sources:
        if source.mask_dir is not None and not source.mask_dir.is_dir():
            where = "" if source.where == "train_data_dir" else f"{source.where}: "
            faults.append(
                f"{where}mask_dir: {source.mask_dir}: no such folder. Put the masks there, or correct the path."
            )
    if faults:
        raise DataError("\n".join(faults))
    return sources


def source_of(name: str, sources: Sequence[PictureSource]) -> PictureSource:
    """The folder that a picture of this name comes from."""
    return max((each for each in sources if name.startswith(each.prefix)), key=lambda each: len(each.prefix))


def folders_inside(folder: Path, others: Sequence[Path]) -> list[str]:
    """Of other folders those that lie inside of this one, relative to it: they are read by themselves, not as part of it."""
    whole = folder.resolve()
    inside = []
    for other in others:
        place = other.resolve()
        if place != whole and place.is_relative_to(whole):
            inside.append(place.relative_to(whole).as_posix())
    return inside


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where another folder has it already."""
    name = name or "pictures"
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return free
