"""The answers of each step as a page to read: `samples/step-000100.md`."""

from __future__ import annotations

import re
from pathlib import Path

from lora_scripts.atomic import write_atomically
from lora_scripts.training.events import Answers, Listener

__all__ = ["AnswerFiles", "answer_page"]


class AnswerFiles(Listener):
    """Keeps every step's answers in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def answered(self, answers: Answers) -> None:
        page = answer_page(answers).encode("utf-8", errors="replace")
        write_atomically(self._folder / f"step-{answers.step:06}.md", page)


def answer_page(answers: Answers) -> str:
    """Markdown: every prompt with both answers and, where it is known, the one in the data."""
    parts = [f"# Step {answers.step}", *(f"**{line}**" for line in answers.alarms)]
    expected = answers.expected or [""] * len(answers.prompts)
    asked = zip(answers.prompts, answers.base, answers.adapter, expected, strict=True)
    for number, (prompt, base, adapter, wanted) in enumerate(asked, start=1):
        parts += [f"## {number}", _block(prompt), "Base model:", _block(base.text)]
        parts += ["With the LoRA" + (":" if adapter.ended else " (cut off):"), _block(adapter.text)]
        parts += ["In the data:", _block(wanted)] if wanted else []
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    """The text as it is, whatever marks it holds."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}text\n{text}\n{fence}"
