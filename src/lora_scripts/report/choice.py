"""The saved steps side by side: the figures behind the choice of the finished file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.report.charts import count
from lora_scripts.report.markup import Child, Html, el
from lora_scripts.report.parts import table

if TYPE_CHECKING:
    from lora_scripts.choosing.rule import StepScore
    from lora_scripts.report.facts import ReportFacts

__all__ = ["step_table"]


def step_table(report: ReportFacts) -> Html | None:
    """One row per saved step that was compared."""
    if not report.step_scores:
        return None
    columns = list(dict.fromkeys(what for score in report.step_scores for what, _ in score.values))
    rows = [_row(score, columns, score.step == report.chosen_step) for score in report.step_scores]
    return el(
        "div",
        table(["Step", *columns, "Better than the last step by"], rows),
        el(
            "p",
            "The last column counts in differences that matter, with its standard error; an earlier step is taken when it is "
            "above 1 and beyond the noise.",
            class_="soft",
        ),
    )


def _row(score: StepScore, columns: list[str], chosen: bool) -> list[Child]:
    values = dict(score.values)
    gain = f"{score.gain.total.mean:+.2f} ± {score.gain.total.error:.2f}" if score.gain else "-"
    mark = " ✔ finished file" if chosen else ""
    return [f"{count(score.step)}{mark}", *(values.get(what, "-") for what in columns), gain]
