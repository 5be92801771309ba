"""What torch's allocator on the CPU hands out, by its own record."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import profile

__all__ = ["allocated_peak"]


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes handed out at one time while `work` runs, beyond what was handed out before."""
    with profile(profile_memory=True) as record:
        result = work()
    del result
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
