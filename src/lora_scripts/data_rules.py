"""Rules between the settings of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.config import PictureFolder, RunConfig

__all__ = ["data_faults"]


def data_faults(config: RunConfig, inert: Callable[[str, str], None]) -> list[str]:
    """What is wrong, one line each; what merely has no effect is told to `inert(setting, reason)`."""
    if config.task_type != "text-to-image":  # settings of pictures are refused there as such
        return [] if config.train_data_dir else ["train_data_dir: is missing; every run needs it."]
    faults = []
    reason = f"masked_loss is {config.masked_loss}"
    if config.masked_loss != "folder":
        inert("mask_dir", reason)
    if config.masked_loss == "none":
        inert("masked_weight_outside", reason)
        inert("masked_normalize", reason)
    if config.train_data_dir is None:
        if not config.folders:
            return ["train_data_dir: is missing; name the folder of pictures there, or several in folders."]
        for setting in ("metadata_path", "mask_dir"):
            inert(setting, "train_data_dir is not set; give it to the entry of folders that it belongs to")
        learnt = [folder for folder in config.folders if not folder.regularization]
        if not learnt:
            faults.append(
                "folders: every entry is for regularization, so there is nothing to learn. Set train_data_dir."
            )
        if all(folder.trigger_word is not None for folder in learnt):
            inert("trigger_word", "every entry of folders has its own")
        if all(folder.repeats is not None for folder in learnt):
            inert("repeats", "every entry of folders has its own")
    for number, folder in enumerate(config.folders, start=1):
        faults += [f"folders: entry {number}: {fault}" for fault in _folder_faults(folder, config)]
    return [*faults, *_same_folder_twice(config)]


def _folder_faults(folder: PictureFolder, config: RunConfig) -> Iterator[str]:
    if folder.name is not None and not re.fullmatch(r"[^\\/:*?\"<>|\x00-\x1f]+", folder.name):
        yield f"name: {folder.name!r} holds characters that a folder's name cannot have."
    if folder.regularization and folder.trigger_word:
        yield "trigger_word: has no effect because regularization pictures never get one. Remove it."
    if folder.mask_dir is not None and config.masked_loss != "folder":
        yield f"mask_dir: has no effect because masked_loss is {config.masked_loss}. Remove it or set masked_loss: folder."
    elif folder.mask_dir is not None and folder.regularization:
        yield "mask_dir: has no effect because regularization pictures are always taken whole. Remove it."


def _same_folder_twice(config: RunConfig) -> Iterator[str]:
    seen = {config.train_data_dir.resolve(): "train_data_dir"} if config.train_data_dir is not None else {}
    names: dict[str, int] = {}
    for number, folder in enumerate(config.folders, start=1):
        first = seen.setdefault(folder.path.resolve(), f"entry {number}")
        if first != f"entry {number}":
            yield f"folders: entry {number}: is the same folder as {first}; to see its pictures more often, set repeats."
        if folder.name is not None and names.setdefault(folder.name, number) != number:
            yield f"folders: entry {number}: name: entry {names[folder.name]} is called {folder.name!r} too."
