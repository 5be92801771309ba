"""How much memory a run may take: what is free on the device that trains, less a reserve, or the user's own limit."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["USABLE", "available_memory", "memory_budget"]

USABLE = 0.92
"""Share of the memory; drivers and the desktop take the rest, and Windows moves tensors to slow memory."""


def memory_budget(device: torch.device, limit_gb: float | None, held_bytes: int) -> int:
    """Bytes that the run may use in all, what it holds already included.

    Args:
        limit_gb: `memory_limit_gb`, in 10^9 bytes: a smaller budget than what is free, never a larger one.
        held_bytes: weights that are on the device already, which no longer count as free.
    """
    usable = round(USABLE * _reachable(device, held_bytes))
    return usable if limit_gb is None else min(usable, round(limit_gb * 1e9))


def _reachable(device: torch.device, held_bytes: int) -> int:
    """What would be free if this process held nothing."""
    import torch

    if device.type == "cuda":
        # Reserved memory is all that torch holds, the weights and what it keeps for later.
        return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return available_memory() + held_bytes


def available_memory() -> int:
    """Bytes that this machine can give to programs without moving others to the disk."""
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "darwin":
        # What macOS can free is not told in one number: half of the machine is a careful guess.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _linux()


def _linux() -> int:
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    # A container may be given less than the machine has.
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text("ascii"))
        used = int((group / "memory.current").read_text("ascii"))
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return available
    return max(0, min(available, most - used))


def _windows() -> int:
    class Status(ctypes.Structure):
        _fields_ = [
            ("dwLength", ctypes.c_uint32),
            ("dwMemoryLoad", ctypes.c_uint32),
            ("ullTotalPhys", ctypes.c_uint64),
            ("ullAvailPhys", ctypes.c_uint64),
            ("ullTotalPageFile", ctypes.c_uint64),
            ("ullAvailPageFile", ctypes.c_uint64),
            ("ullTotalVirtual", ctypes.c_uint64),
            ("ullAvailVirtual", ctypes.c_uint64),
            ("ullAvailExtendedVirtual", ctypes.c_uint64),
        ]

    status = Status()
    status.dwLength = ctypes.sizeof(status)
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009 - the attribute exists on Windows only
    kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.ullAvailPhys)
