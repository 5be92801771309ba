"""What the LoRA does to pictures: before and after, checkpoint by checkpoint, and in figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.report.charts import count
from lora_scripts.report.markup import Html, el, sentence, zh
from lora_scripts.report.parts import spread, step_label
from lora_scripts.report.pictures import open_picture, picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.report.facts import Measurement
    from lora_scripts.training.record import PreviewFiles, RunHistory

__all__ = ["before_and_after", "checkpoints_grid", "measurements"]

_PAIR_SIDE = 512
_GRID_SIDE = 256
_MAX_COLUMNS = 7
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def before_and_after(history: RunHistory, chosen_step: int | None = None) -> Html | None:
    """The previews of the untrained model beside those of the finished file's step (default: the last), by prompt."""
    steps = sorted(history.previews)
    if len(steps) < 2 or steps[0] != 0:
        return None
    shown = chosen_step if chosen_step in history.previews else steps[-1]
    first, last = history.previews[steps[0]], history.previews[shown]
    untrained = _by_prompt(first)
    pairs = []
    for key, file in _by_prompt(last).items():
        before = open_picture(untrained[key]) if key in untrained else None
        after = open_picture(file)
        if before is not None and after is not None:
            pairs.append(_pair(key[0], before, after))
    if not pairs:
        return None
    return el(
        "section",
        el("div", el("h2", "Before and after", zh("训练前后")), class_="head"),
        el(
            "p",
            f"The same prompts and seeds, rendered by the base model alone and with the LoRA of step {count(shown)}.",
            class_="lead",
        ),
        el("div", pairs, class_="pairs"),
        id="before-after",
        data_pairs=True,
    )


def _by_prompt(previews: PreviewFiles) -> dict[tuple[str, int], Path]:
    """The files by prompt and by how often the same prompt came before; seeds follow the order."""
    seen: Counter[str] = Counter()
    files = {}
    for prompt, file in zip(previews.prompts, previews.files, strict=False):
        files[prompt, seen[prompt]] = file
        seen[prompt] += 1
    return files


def _pair(prompt: str, before: Image, after: Image) -> Html:
    return el(
        "figure",
        el(
            "div",
            el(
                "div",
                picture(before, _PAIR_SIDE, f"Before: {prompt}"),
                el("span", "before", class_="chip"),
                class_="before",
            ),
            el(
                "div",
                picture(after, _PAIR_SIDE, f"With the LoRA: {prompt}"),
                el("span", "with LoRA", class_="chip"),
                class_="after",
            ),
            class_="pair",
        ),
        el("figcaption", el("span", prompt or "(empty prompt)", class_="clamp", title=prompt)),
    )


def checkpoints_grid(history: RunHistory, chosen_step: int | None = None) -> Html | None:
    """Prompts down, steps across; the finished file's step is marked."""
    steps = spread(sorted(history.previews), _MAX_COLUMNS)
    if not steps:
        return None
    shown = {step: _by_prompt(history.previews[step]) for step in steps}
    rows = []
    for key in dict.fromkeys(key for step in steps for key in shown[step]):
        prompt = key[0]
        cells = []
        for step in steps:
            image = open_picture(shown[step][key]) if key in shown[step] else None
            cells.append(
                el("td", None if image is None else picture(image, _GRID_SIDE, f"Step {count(step)}: {prompt}"))
            )
        rows.append(
            el("tr", el("th", el("span", prompt or "(empty prompt)", class_="clamp", title=prompt), scope="row"), cells)
        )
    heads = [el("th", step_label(step, chosen_step), scope="col") for step in steps]
    lead = "If another column looks better to you than the finished file's, use that step's file in checkpoint-N."
    if len(steps) < len(history.previews):
        lead += f" {len(steps)} of {len(history.previews)} steps are shown; all pictures lie in the samples folder."
    return el(
        "section",
        el("div", el("h2", "Previews by step", zh("各阶段预览")), class_="head"),
        el("p", lead, class_="lead"),
        el(
            "div",
            el(
                "table",
                el("thead", el("tr", el("td"), heads)),
                el("tbody", rows),
                class_="grid",
                style=f"max-width:{190 + 210 * len(steps)}px",
            ),
            class_="scroll",
        ),
        id="previews",
    )


def measurements(figures: Sequence[Measurement]) -> Html | None:
    """Each figure without and with the LoRA; percentages also as bars."""
    if not figures:
        return None
    return el(
        "section",
        el("div", el("h2", "Measured effect", zh("效果测量")), class_="head"),
        el("div", (_measurement(figure) for figure in figures), class_="measures"),
        id="measured",
    )


def _measurement(figure: Measurement) -> Html:
    before, after = _PERCENT.fullmatch(figure.before), _PERCENT.fullmatch(figure.after)
    if before and after:
        values = el(
            "div",
            _bar("before", figure.before, float(before[1]), "fill"),
            _bar("with LoRA", figure.after, float(after[1]), "fill now"),
            class_="bars",
        )
    else:
        values = el(
            "p",
            f"{figure.before} ",
            el("span", "\u2192", class_="soft"),
            " ",
            el("strong", figure.after),
            class_="change",
        )
    label = el("div", el("b", sentence(figure.label)), el("p", figure.note) if figure.note else None)
    return el("div", label, values, class_="measure")


def _bar(label: str, value: str, percent: float, look: str) -> list[Html]:
    fill = el("div", class_=look, style=f"width:{min(percent, 100):g}%")
    return [el("span", label, class_="soft"), el("div", fill, class_="track"), el("strong", value)]
