"""Folders that are there whole or not at all: filled beside, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_scripts.atomic import sync_folder, write_failure
from lora_scripts.errors import DataError

__all__ = ["PARTIAL", "new_folder", "require_free"]

PARTIAL = ".partial"
"""Ending of a folder that is still being filled; one that a killed process left behind is taken away by the next."""


def require_free(folder: Path) -> None:
    """Does nothing where `folder` can be made: nothing is there, or an empty folder.

    Raises:
        DataError: something is there that would be lost.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise DataError(f"{folder}: is there already and is no folder. Name another output folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: is there already and holds files. Name another output folder, or delete this one.")


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which gets the name `folder` when the block ends well and is taken away when it does not.

    Args:
        replace: an older folder of that name gives way, in two renames, once the new one is complete. Only for folders
            that the program itself wrote.
    Raises:
        DataError: `folder` holds files and `replace` is not set; the disk is full or the place cannot be written.
    """
    folder = Path(folder)
    if not replace:
        require_free(folder)
    partial, aside = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                with open(path, "rb+") as file:  # Windows flushes only what was opened for writing
                    os.fsync(file.fileno())
        _put_in_place(partial, folder, aside)
        sync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise DataError(write_failure(folder, None, error)) from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path, aside: Path) -> None:
    """Two renames, since no system swaps folders in one; killed between them, the older folder is found under `aside`."""
    if not folder.exists():
        os.rename(partial, folder)
        return
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    try:
        os.rename(partial, folder)
    except OSError:
        os.rename(aside, folder)
        raise
