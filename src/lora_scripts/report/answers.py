"""What the LoRA does to a language model's answers: beside the base model's, and step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_scripts.report.charts import count
from lora_scripts.report.markup import Child, Html, el, zh
from lora_scripts.report.parts import lines, section, spread, step_label

if TYPE_CHECKING:
    from lora_scripts.dialogues.answers import Answer
    from lora_scripts.training.events import Answers

__all__ = ["answers_side_by_side"]

_MAX_COLUMNS = 7


def answers_side_by_side(told: dict[int, Answers], chosen_step: int | None = None) -> Html | None:
    """Each prompt with the answers of base model and LoRA at the finished file's step (default: the last), and by step."""
    if not told:
        return None
    step = chosen_step if chosen_step in told else max(told)
    shown = told[step]
    alarms = [f"Step {count(at)}: {line}" for at, answers in told.items() for line in answers.alarms]
    expected = shown.expected or [""] * len(shown.prompts)
    cards = [
        _card(step, step == chosen_step, *each)
        for each in zip(shown.prompts, shown.base, shown.adapter, expected, strict=True)
    ]
    return section(
        "answers",
        "Answers: base and LoRA",
        "回答对比",
        lines(alarms, "warn") if alarms else None,
        el("div", cards, class_="answers"),
        _by_step(told, chosen_step) if len(told) > 1 else None,
        lead=f"The same prompts, answered by the base model alone and with the LoRA of step {count(step)}, the likeliest word "
        "every time.",
    )


def _card(step: int, chosen: bool, prompt: str, base: Answer, adapter: Answer, expected: str) -> Html:
    mark = " ✔ finished file" if chosen else ""
    return el(
        "article",
        el("p", prompt or "(empty prompt)", class_="asked"),
        el(
            "div",
            _said("base model", "原模型", base.text, base.ended),
            _said(f"with LoRA, step {count(step)}{mark}", "微调后", adapter.text, adapter.ended, "now"),
            _said("in the data", "数据", expected, True) if expected else None,
            class_="said",
        ),
    )


def _said(who: str, chinese: str, text: str, ended: bool, look: str = "") -> Html:
    return el("div", el("h4", who, zh(chinese)), _text(text, ended), class_=look or None)


def _text(text: str, ended: bool) -> Html:
    cut = None if ended else el("span", " … cut off", class_="soft")
    return el("p", text or el("span", "(no answer)", class_="soft"), cut, class_="answer")


def _by_step(told: dict[int, Answers], chosen_step: int | None) -> Html:
    """Prompts down, steps across; a click shows it."""
    steps = spread([step for step in told if step > 0], _MAX_COLUMNS)
    last = told[max(told)]
    heads = [el("th", step_label(step, chosen_step), scope="col") for step in (0, *steps)]
    rows = [
        el("tr", el("th", prompt or "(empty prompt)", scope="row"), _cells(prompt, number, last, told, steps))
        for number, prompt in enumerate(last.prompts)
    ]
    left = len([step for step in told if step > 0]) - len(steps)
    return el(
        "details",
        el("summary", "Answers by step", zh("各阶段回答")),
        el(
            "div",
            el("table", el("thead", el("tr", el("td"), heads)), el("tbody", rows), class_="grid answers-by-step"),
            class_="scroll",
        ),
        el("p", f"{count(left)} more steps lie in the samples folder.", class_="soft") if left else None,
    )


def _cells(prompt: str, number: int, last: Answers, told: dict[int, Answers], steps: Sequence[int]) -> list[Child]:
    cells: list[Child] = [el("td", _text(last.base[number].text, last.base[number].ended))]
    for step in steps:
        answers = told[step]
        # A resumed run may have been asked other prompts before.
        same = number < len(answers.prompts) and answers.prompts[number] == prompt
        answer = answers.adapter[number] if same else None
        cells.append(el("td", _text(answer.text, answer.ended) if answer is not None else None))
    return cells
