"""The pictures or dialogues that the model fits worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.report.markup import Html, el
from lora_scripts.report.parts import section, table, thumbnail

if TYPE_CHECKING:
    from lora_scripts.report.facts import ReportFacts

__all__ = ["worst_fitted"]

_OF_PICTURES = (
    "Their losses in training are the highest, compared with what is usual at the same noise levels. A wrong caption, a "
    "damaged picture or one that does not belong here shows up at the front; a picture rich in detail may too."
)
_OF_DIALOGUES = (
    "Their losses in training are the highest. A wrong answer, one of another kind or in another language shows up at the "
    "front; an answer that nobody could foresee, such as a number or a name, may too."
)


def worst_fitted(report: ReportFacts) -> Html | None:
    """The worst first: pictures with caption, loss and a hint, dialogues as a table."""
    title = ("worst-fitted", "Worst fitted", f"最难拟合的{report.words.chinese_noun}")
    if report.worst_fitted:
        small = el(
            "div", (thumbnail(each.picture, each.loss, each.hint) for each in report.worst_fitted), class_="data"
        )
        return section(*title, small, lead=_OF_PICTURES)
    if report.worst_fitted_texts:
        rows = [[name, el("div", text, class_="answer"), how] for name, text, how in report.worst_fitted_texts]
        return section(*title, table(["Dialogue", "Text", "Loss"], rows), lead=_OF_DIALOGUES)
    return None
