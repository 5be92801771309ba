"""A report as one screen of text, worst first; colours on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from lora_scripts.preflight.findings import Finding, Level, Report
from lora_scripts.preflight.wording import count, some

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["report_lines", "report_notes", "show_report"]

Line = tuple[str, str]
"""A style of rich, and the text."""

STYLES: Mapping[Level, str] = {"red": "bold red", "amber": "yellow", "note": "green"}
SIGNS: Mapping[Level, str] = {"red": "RED  ", "amber": "amber", "note": "note "}
NAMED = 4
"""Pictures named under a finding; --json has them all."""
NOTES_OF_A_RUN = {"prediction", "enlarged"}
"""Notes that a run tells; it says the others in its own words."""
NAMED_BY_THE_RUN = {"unreadable"}
"""Findings whose pictures a run names anyway, each with its reason, among those left out."""
PLAIN_WIDTH, PLAIN_HEIGHT = 120, 50
"""Columns and lines where there is no terminal to ask."""


def show_report(report: Report, stream: TextIO | None = None) -> None:
    """Writes the report to `stream` (standard output by default); NO_COLOR is respected."""
    from rich.text import Text

    console = _console(stream or sys.stdout)
    width = console.width if console.is_terminal else PLAIN_WIDTH
    height = shutil.get_terminal_size().lines - 2 if console.is_terminal else PLAIN_HEIGHT
    for style, text in [*report_lines(report, width, height), *(("", line) for line in report.shown)]:
        console.print(Text(text, style), soft_wrap=True)


def report_notes(report: Report, *, with_red: bool = True) -> list[tuple[str, bool]]:
    """The report for a run's log: one line per finding, and whether it is a warning; what is only counted is left out."""
    lines = []
    for finding in report.worst_first:
        if (finding.level == "note" and finding.code not in NOTES_OF_A_RUN) or (
            finding.level == "red" and not with_red
        ):
            continue
        named = (
            f"{report.words.examples.capitalize()}: {_named(finding)}."
            if finding.names and finding.code not in NAMED_BY_THE_RUN
            else ""
        )
        lines.append((" ".join(filter(None, [finding.text, named, finding.remedy])), finding.level != "note"))
    return lines


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, markup=False, highlight=False, emoji=False, force_terminal=stream.isatty())


def report_lines(report: Report, width: int, height: int) -> list[Line]:
    """At most about `height` lines of at most `width` columns; everything red is always among them."""
    lines = [_headline(report), ("", "")]
    findings = report.worst_first
    for number, finding in enumerate(findings):
        block = _block(finding, width)
        if len(lines) + len(block) > height - 2 and finding.level != "red":
            left = len(findings) - number
            lines.append(("dim", f"... and {count(left, 'more finding')}; --json lists everything."))
            break
        lines += block
    return [*lines, ("", ""), _verdict(report)]


def _headline(report: Report) -> Line:
    return ("bold", f"{report.num_trained} of {count(report.num_examples, report.words.example)} can be trained on.")


def _verdict(report: Report) -> Line:
    red, amber = report.count("red"), report.count("amber")
    if red:
        return ("bold red", f"Blocked by {count(red, 'red finding')}. --force goes on all the same.")
    if amber:
        return ("yellow", f"Can be trained; {count(amber, 'finding')} will make it less good than it could be.")
    return ("green", "Can be trained; nothing to complain of.")


def _block(finding: Finding, width: int) -> list[Line]:
    style = STYLES[finding.level]
    lines = [(style, line) for line in _wrapped(finding.text, f"{SIGNS[finding.level]}  ", width)]
    if finding.names and finding.level != "note":
        lines += [("", line) for line in _wrapped(_named(finding), "       ", width)]
    if finding.remedy:
        lines += [("cyan", line) for line in _wrapped(finding.remedy, "       -> ", width)]
    return lines


def _named(finding: Finding) -> str:
    shown = [f"{name} ({finding.details[name]})" if name in finding.details else name for name in finding.names[:NAMED]]
    return some([*shown, *finding.names[NAMED:]], NAMED)


def _wrapped(text: str, start: str, width: int) -> Sequence[str]:
    return textwrap.wrap(
        text, max(40, width), initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )
