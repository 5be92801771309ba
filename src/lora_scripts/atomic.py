"""Files that are there whole or not at all: write beside, flush to the disk, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from pathlib import Path

from lora_scripts.errors import DataError

__all__ = ["replace_file", "sync_folder", "write_atomically", "write_failure"]

_RENAME_TRIES = 5
"""Windows refuses to replace a file that a virus scanner or an indexer has open; that passes within a second."""


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path` by a file holding `data` (text is written as UTF-8, line ends as given).

    Whoever reads `path` at any moment, also after a power cut, finds the old content or the new one. An existing file
    keeps its permissions. Missing parent folders are made.

    Raises:
        DataError: the target is a symbolic link or a folder, the disk is full, or the place cannot be written.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    # A link in a data folder may point anywhere: replacing what it points at would change a file nobody named.
    if path.is_symlink():
        raise DataError(f"{path}: is a symbolic link, which is never written through. Name the file it points at.")
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Name a file in it.")
    # The random part keeps two writers apart; the leading dot keeps it out of folder listings. The name of the target
    # is not part of it: a name of 255 bytes must still be writable.
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
        try:
            with open(temporary, "xb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(temporary, mode)
            replace_file(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(write_failure(path, len(payload), error)) from error


def replace_file(temporary: Path, path: Path) -> None:
    """Renames in one step; waits a second for other programs to let go of an older `path`."""
    for attempt in range(_RENAME_TRIES):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            if os.name != "nt" or attempt == _RENAME_TRIES - 1:
                raise
            time.sleep(0.1 * 2**attempt)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, where the system lets a folder be opened (not on Windows)."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_failure(path: Path, num_bytes: int | None, error: OSError) -> str:
    """What the system's error means for whoever wanted `path` written, and what to do; `num_bytes` where it is a file."""
    kind = "folder" if num_bytes is None else "file"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG):
        needed = "" if num_bytes is None else f", {num_bytes / 1e6:.1f} MB are needed"
        return (
            f"{path}: no room left on the disk{needed}. The older {kind} is unharmed. "
            "Free some space and run the same command again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{path}: cannot be written ({os.strerror(error.errno)}). Close programs that hold it open, "
            "check the folder's permissions, or choose another place."
        )
    return f"{path}: cannot be written ({error.strerror or error}). The older {kind}, if any, is unharmed."
