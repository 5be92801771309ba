"""Large files that are there whole or not at all, written piece by piece; and which places a command may write to."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lora_scripts.atomic import replace_file, sync_folder, write_failure
from lora_scripts.errors import ConfigError, DataError

__all__ = ["new_file", "require_new_file"]


def require_new_file(path: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Does nothing where a command may write the weights file `path`.

    Args:
        inputs: files and folders that the command reads.
        force: whether an older file of that name may go.
    Raises:
        ConfigError: it is one of the inputs or lies in one, is a folder or a link, is there already, or has another ending.
    """
    if path.suffix != ".safetensors":
        raise ConfigError(f"--output {path}: must end in .safetensors.")
    for given in inputs:
        if path.resolve() == given.resolve() or given.resolve() in path.resolve().parents:
            raise ConfigError(f"--output {path}: is or lies in {given}, which is read. Name another file.")
    if path.is_symlink() or path.is_dir():
        raise ConfigError(f"--output {path}: is a {'folder' if path.is_dir() else 'symbolic link'}. Name a file.")
    if path.exists() and not force:
        raise ConfigError(f"--output {path}: is there already. Name another file, or add --force to replace it.")


@contextmanager
def new_file(path: Path, num_bytes: int) -> Iterator[IO[bytes]]:
    """A file to write, which gets the name `path` when the block ends well and is taken away when it does not.

    An older file of that name is there until then. Missing parent folders are made.

    Args:
        num_bytes: that it will have; a disk without that room is found before the first one.
    Raises:
        DataError: the disk is full, or the place cannot be written.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(write_failure(path, num_bytes, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
