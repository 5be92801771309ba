"""What the check found before the run: which pictures are concerned, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.preflight.terminal import report_notes
from lora_scripts.preflight.wording import count, some
from lora_scripts.report.markup import Child, Html, el, zh

if TYPE_CHECKING:
    from lora_scripts.preflight.findings import Finding, Report
    from lora_scripts.words import Words

__all__ = ["data_check", "told_by_check"]

_MAX_NAMES = 20
_MAX_DETAIL = 160
"""Characters; the part of a caption that is cut may be a page long."""


def data_check(check: Report | None, words: Words) -> Html | None:
    """The findings, worst first; one sentence when there is nothing to complain of."""
    if check is None:
        return None
    wrong = [finding for finding in check.worst_first if finding.level != "note"]
    known = [finding.text for finding in check.worst_first if finding.level == "note"]
    heads = el("tr", (el("th", head) for head in ("Found", words.examples.capitalize(), "What to do")))
    return el(
        "section",
        el("div", el("h2", "Data check", zh("数据检查")), class_="head"),
        el("p", _lead(check, words), class_="lead"),
        el("table", el("thead", heads), el("tbody", map(_row, wrong)), class_="list") if wrong else None,
        el("ul", (el("li", line) for line in known), class_="lines", style="margin-top:18px") if known else None,
        id="check",
    )


def told_by_check(check: Report | None) -> set[str]:
    """The lines of a run's log that this section says in its own words."""
    return set() if check is None else {text for text, _ in report_notes(check)}


def _lead(check: Report, words: Words) -> str:
    red, amber = check.count("red"), check.count("amber")
    verdict = "nothing to complain of"
    if red:
        verdict = f"{count(red, 'red finding')}, trained all the same"
    elif amber:
        verdict = f"{count(amber, 'finding')} that may make the LoRA less good than it could be"
    return f"{check.num_trained} of {count(check.num_pictures, words.example)} could be trained on; {verdict}."


def _row(finding: Finding) -> Html:
    badge = el("span", finding.level, class_="badge warn")
    found: Child = [badge, " ", finding.text] if finding.level == "red" else finding.text
    return el("tr", el("td", found), el("td", _pictures(finding)), el("td", finding.remedy))


def _pictures(finding: Finding) -> Child:
    if not finding.details:
        return some(finding.names, _MAX_NAMES)
    rows = [el("div", name, _detail(finding.details.get(name, ""))) for name in finding.names[:_MAX_NAMES]]
    left = len(finding.names) - len(rows)
    return [*rows, el("div", f"and {left:,} more", class_="soft")] if left else rows


def _detail(text: str) -> Html | None:
    short = text if len(text) <= _MAX_DETAIL else text[: _MAX_DETAIL - 3] + "..."
    return el("span", f" {short}", class_="soft") if text else None
