"""Pieces that several sections of the page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_scripts.report.charts import count
from lora_scripts.report.markup import Child, Html, el, zh
from lora_scripts.report.pictures import picture

if TYPE_CHECKING:
    from lora_scripts.report.facts import Thumbnail

__all__ = ["lines", "more", "section", "spread", "step_label", "table", "thumbnail"]

_THUMBNAIL_SIDE = 192


def section(anchor: str, title: str, chinese: str, *children: Child, lead: str = "") -> Html:
    """A section that the contents link to."""
    return el(
        "section",
        el("div", el("h2", title, zh(chinese)), class_="head"),
        el("p", lead, class_="lead") if lead else None,
        *children,
        id=anchor,
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[Child]]) -> Html:
    """Rows under optional heads."""
    head = el("thead", el("tr", (el("th", each) for each in heads))) if heads else None
    body = el("tbody", (el("tr", (el("td", child) for child in row)) for row in rows))
    return el("table", head, body, class_="list")


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, always with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def step_label(step: int, chosen_step: int | None) -> str:
    """The head of a step's column."""
    mark = " ✔ finished file" if step == chosen_step else ""
    return "base model" if step == 0 else f"step {count(step)}{mark}"


def lines(lines: Sequence[str], look: str = "") -> Html:
    """A list of remarks."""
    return el("ul", (el("li", line) for line in lines), class_=f"lines {look}".strip())


def more(number: int) -> Html | None:
    """How many are not shown."""
    return (
        el("p", f"{count(number)} more are not shown.", class_="soft", style="margin-top:12px") if number > 0 else None
    )


def thumbnail(each: Thumbnail, *below: str) -> Html:
    """A picture of the data set with its caption, its name, and more lines below them."""
    return el(
        "figure",
        el("div", picture(each.image, _THUMBNAIL_SIDE, each.caption or each.name), class_="frame"),
        el(
            "figcaption",
            el("span", each.caption or "no caption", class_="clamp", title=each.caption),
            (el("span", line, class_="soft") for line in (each.name, *below)),
        ),
    )
