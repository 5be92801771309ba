"""One run per output folder: a lock file that names its process, and outlives no process.

The file `.run-lock.json` holds the process's number and its mark, which tells it from a later process of the same
number: on Linux the boot and the tick at which it started, elsewhere its start as the system states it. The time of day
plays no part, so a clock that is set back changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_scripts.errors import ResumeError, TrainingError

__all__ = ["FILE_NAME", "Owner", "locked", "process_mark", "require_own_folder"]

FILE_NAME = ".run-lock.json"
_TRIES = 20
"""Each failed try means that another process has just changed the lock."""


@dataclass(frozen=True)
class Owner:
    """Who holds a folder: the process's number, its mark (see `process_mark`), and the machine's name."""

    pid: int
    mark: str
    host: str

    @classmethod
    def this_process(cls) -> Owner:
        return cls(os.getpid(), process_mark(os.getpid()) or "", platform.node())

    @property
    def alive(self) -> bool:
        """Whether it still runs; of another machine's process nothing can be known, so it counts as running."""
        return self.host != platform.node() or process_mark(self.pid) == self.mark


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process while the block runs; a dead process's lock is taken over.

    Raises:
        ResumeError: another run holds it.
        OSError: the folder cannot be written.
    """
    path, me = folder / FILE_NAME, Owner.this_process()
    content = json.dumps(asdict(me)).encode()
    for _ in range(_TRIES):
        if _create(path, content):
            break
        before = _read_bytes(path)
        if before is None:
            continue  # given back in this moment
        holder = _parse(before)
        if holder is not None and holder.alive:
            raise ResumeError(_refusal(folder, holder))
        _take_away(path, before)
    else:
        raise ResumeError(f"{path}: other runs are starting in this folder. Give each its own output_dir.")
    try:
        yield
    finally:
        if _read_bytes(path) == content:
            with contextlib.suppress(OSError):
                path.unlink()


def require_own_folder(folder: Path) -> None:
    """Raises TrainingError when the folder is gone, or meanwhile belongs to another run: nothing may be written then."""
    if not folder.is_dir():
        raise TrainingError(
            f"{folder}: the output folder was removed while the run went on. It stops here, and nothing was written in "
            "its place. Run the same command again to start anew."
        )
    content = _read_bytes(folder / FILE_NAME)
    holder = None if content is None else _parse(content)
    if holder is not None and holder != Owner.this_process() and holder.alive:
        raise TrainingError(
            f"{folder}: the output folder now belongs to process {holder.pid} on {holder.host}. This run stops, and "
            "nothing of the other one was overwritten. Choose another output_dir for it."
        )


def process_mark(pid: int) -> str | None:
    """A text that this process has had since it started and no later one of its number has; None when it is dead."""
    if sys.platform == "win32":
        return _windows_mark(pid)
    if Path("/proc/self/stat").exists():
        try:
            # The second field, the program's name, may itself hold spaces and brackets.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"  # field 22: start in ticks after the boot
    shown = subprocess.run(["/bin/ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)  # noqa: S603
    return shown.stdout.strip() or None


def _windows_mark(pid: int) -> str | None:
    import ctypes

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return None
    try:
        created, ended, in_kernel, in_user = (ctypes.c_uint64() for _ in range(4))
        times = [ctypes.byref(value) for value in (created, ended, in_kernel, in_user)]
        if not kernel.GetProcessTimes(ctypes.c_void_p(handle), *times) or ended.value:
            return None
        return str(created.value)
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))


def _create(path: Path, content: bytes) -> bool:
    """Puts the lock in place with its content, in one step; false when there is one."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links, such as exFAT
            try:
                with path.open("xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _take_away(path: Path, expected: bytes) -> None:
    """Removes the lock if it is still the one that was read; a newer one is put back."""
    aside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read_bytes(aside) != expected:
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(content: bytes) -> Owner | None:
    """The owner, or None for a file that no run of ours left behind whole."""
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None
    return owner if isinstance(owner.pid, int) else None


def _refusal(folder: Path, holder: Owner) -> str:
    if holder.host == platform.node():
        return (
            f"output_dir: {folder}: another run, process {holder.pid}, is writing there. "
            "Wait until it ends or stop it, or choose another output_dir."
        )
    return (
        f"output_dir: {folder}: a run on {holder.host}, process {holder.pid}, has it. Choose another output_dir; "
        f"if that run has ended, delete {folder / FILE_NAME} and run the same command again."
    )
