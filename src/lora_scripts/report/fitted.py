"""The pictures that the model fits worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_scripts.report.markup import Html, el
from lora_scripts.report.parts import section, thumbnail

if TYPE_CHECKING:
    from lora_scripts.report.facts import HardThumbnail

__all__ = ["worst_fitted"]


def worst_fitted(pictures: Sequence[HardThumbnail]) -> Html | None:
    """Pictures with caption, loss and a hint, the worst first."""
    if not pictures:
        return None
    return section(
        "worst-fitted",
        "Worst fitted",
        "最难拟合的图片",
        el("div", (thumbnail(each.picture, each.loss, each.hint) for each in pictures), class_="data"),
        lead="Their losses in training are the highest, compared with what is usual at the same noise levels. A wrong caption, a "
        "damaged picture or one that does not belong here shows up at the front; a picture rich in detail may too.",
    )
