"""Figures as people read them: a median with its spread, a Markdown table, JSON, and the page they are put into."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import DOCS

NOT_MEASURED = "not measured"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`1.52 (1.40 to 1.71)`; a single value stands alone."""
    if not values:
        return NOT_MEASURED
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def paired(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times longer theirs takes, turn by turn."""
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def kept(file: Path) -> dict[str, Any]:
    """What earlier calls have found; empty where there was none."""
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def keep(file: Path, results: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def update_docs(text: str, name: str) -> None:
    """Puts the text between the markers of that name in docs/benchmarks.md."""
    page = DOCS.read_text("utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        sys.exit(f"{DOCS}: must hold {start} and {end} once each")
    before, rest = page.split(start)
    DOCS.write_text(f"{before}{start}\n{text}{end}{rest.split(end)[1]}", "utf-8")
    print(f"{DOCS}: updated")


def percent(share: float) -> str:
    """A share as tables have it: "84.4 %"."""
    return f"{100 * share:.1f} %"
