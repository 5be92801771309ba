"""How much memory a run takes: the accelerator's where there is one, else the process's own."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["MemoryReading", "memory_now", "process_memory", "reset_peak"]


@dataclass(frozen=True)
class MemoryReading:
    """Memory in bytes.

    Attributes:
        current_bytes: in use now.
        peak_bytes: the most that was in use; since `reset_peak` on CUDA, else since the process began
            (on MPS, the most seen by any reading).
        source: "cuda" and "mps" count what torch has allocated, "process" the resident set.
    """

    current_bytes: int
    peak_bytes: int
    source: Literal["cuda", "mps", "process"]


_mps_peak_bytes = 0


def memory_now(device: torch.device) -> MemoryReading:
    """The memory of the device that trains; a few microseconds on CUDA, no synchronisation."""
    import torch

    global _mps_peak_bytes
    if device.type == "cuda":
        current, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return MemoryReading(current, peak, "cuda")
    if device.type == "mps":
        # MPS keeps no peak of its own.
        current = torch.mps.current_allocated_memory()
        _mps_peak_bytes = max(_mps_peak_bytes, current)
        return MemoryReading(current, _mps_peak_bytes, "mps")
    return process_memory()


def reset_peak(device: torch.device) -> None:
    """Starts the peak anew where that is possible: CUDA and MPS."""
    import torch

    global _mps_peak_bytes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _mps_peak_bytes = 0


def process_memory() -> MemoryReading:
    """The resident memory of this process, now and at its highest."""
    if sys.platform == "win32":
        current, peak = _windows()
    elif sys.platform == "darwin":
        current, peak = _macos()
    else:
        current, peak = _linux()
    return MemoryReading(current, max(current, peak), "process")


def _linux() -> tuple[int, int]:
    import resource

    current = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # Linux counts ru_maxrss in KiB.
    return current, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _macos() -> tuple[int, int]:
    import resource

    # proc_pidinfo(PROC_PIDTASKINFO = 4) fills a struct of 96 bytes; its second 64-bit field is the resident size.
    fields = (ctypes.c_uint64 * 12)()
    library = ctypes.CDLL("/usr/lib/libSystem.B.dylib")
    filled = library.proc_pidinfo(os.getpid(), 4, ctypes.c_uint64(0), ctypes.byref(fields), ctypes.sizeof(fields))
    # macOS counts ru_maxrss in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (int(fields[1]) if filled > 0 else peak), peak


def _windows() -> tuple[int, int]:
    class Counters(ctypes.Structure):
        _fields_ = [
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("WorkingSetSize", ctypes.c_size_t),
            ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
            ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
            ("PagefileUsage", ctypes.c_size_t),
            ("PeakPagefileUsage", ctypes.c_size_t),
        ]

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009 - the attribute exists on Windows only
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel32.GetCurrentProcess())
    if not kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb):
        return 0, 0
    return int(counters.WorkingSetSize), int(counters.PeakWorkingSetSize)
