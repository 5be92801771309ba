"""Numbers and names in sentences."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["count", "gigabytes", "minutes", "some"]


def count(number: int, noun: str) -> str:
    """`1 picture`, `3 pictures`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def some(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def gigabytes(num_bytes: int) -> str:
    """`3.2 GB`, or `12 MB` for less than a tenth of one."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"


def minutes(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`: a prediction is no stopwatch."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
