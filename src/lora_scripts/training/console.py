"""The run in the terminal: a progress bar where there is one, plain lines in files and pipes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lora_scripts.training.events import Answers, Level, Listener, Preview, RunStart, StepReport, Validation
from lora_scripts.training.log_file import duration, in_gib, one_line, shortened, speed, step_line, use_of_time
from lora_scripts.words import PICTURES, words_of

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["ConsoleListener"]

_WIDE = 100
"""From this many columns on, the bar is longer."""
_MOST_OF_A_PROMPT, _MOST_OF_AN_ANSWER = 50, 100
_QUIET_S = 15.0
"""In a file, a long preparation is reported at most this often."""


class ConsoleListener(Listener):
    """Shows the run on `stream` (standard output by default).

    On a terminal: one live bar with the numbers of the last report, notes above it. Elsewhere: a line per report.
    NO_COLOR is respected; characters that the stream's encoding lacks are replaced, not fatal.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console

        class LastingConsole(Console):
            def on_broken_pipe(self) -> None:
                """Goes quiet when whoever read our output has gone (`| head`); the run and its log go on."""
                self.quiet = True
                # The interpreter flushes standard output once more at its end.
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

        stream = stream or sys.stdout
        # A Chinese Windows terminal knows GBK only; a caption with an emoji must not end the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        self.console = LastingConsole(file=stream, markup=False, highlight=False, emoji=False)
        # FORCE_COLOR makes rich take a file for a terminal; a moving bar in a file helps nobody.
        is_tty = stream is not None and stream.isatty()
        self.live = is_tty and self.console.is_terminal and not self.console.is_dumb_terminal
        self._words = PICTURES
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._tasks: dict[str, tuple[TaskID, float]] = {}
        self._said_at: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def note(self, text: str, level: Level = "info") -> None:
        from rich.text import Text

        for line in text.splitlines() or [""]:
            clean = line[: len(line) - len(line.lstrip(" "))] + one_line(line)
            shown = Text(clean) if level == "info" else Text.assemble(("warning: ", "bold yellow"), clean)
            self._print(shown)

    def progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self._began.setdefault(what, now)
        if done >= total:
            self._end_task(what)
            self._began.pop(what)
            self._said_at.pop(what, None)
            # What was too quick to be seen needs no line either, unless there is nothing but lines.
            spent_s = now - began
            if not self.live or spent_s >= 1:
                self._print(f"{what}: {total} done" + (f" in {duration(spent_s)}" if spent_s >= 1 else ""))
        elif self.live:
            bar = self._bar()
            if what not in self._tasks:
                self._tasks[what] = (bar.add_task(what, total=total, numbers=""), now)
            bar.update(self._tasks[what][0], completed=done, total=total, eta=_eta(now - began, done, total))
        elif now - self._said_at.setdefault(what, began) >= _QUIET_S:
            self._said_at[what] = now
            self._print(f"{what}: {done} of {total}")

    def started(self, run: RunStart) -> None:
        self._words = words_of(str(run.settings.get("task_type")), str(run.settings.get("objective", "sft")))
        self._print_facts(run.facts)
        if self.live:
            bar = self._bar()
            self._training = bar.add_task("train", total=run.max_steps, completed=run.first_step, numbers="")

    def ticked(self, step: int) -> None:
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, completed=step)

    def stepped(self, report: StepReport) -> None:
        if self._progress is None or self._training is None:
            self._print(step_line(report, self._words))
            return
        self._progress.update(
            self._training,
            completed=report.step,
            total=report.max_steps,
            numbers=self._numbers(report),
            eta=time.monotonic() + report.eta_s,
        )

    def validated(self, validation: Validation) -> None:
        self._print(
            f"step {validation.step}: validation loss {validation.loss:.4f} on held-out {self._words.examples}, "
            f"{validation.training_loss:.4f} on training {self._words.examples}"
        )

    def previewed(self, preview: Preview) -> None:
        if not self.live:
            self._print(f"step {preview.step}: {len(preview.images)} previews rendered")

    def answered(self, answers: Answers) -> None:
        # One of them says how it goes; all of them stand in samples/ and in the report.
        if answers.prompts:
            prompt, answer = answers.prompts[0], answers.adapter[0].text
            self._print(
                f"step {answers.step}: {_shown(prompt, _MOST_OF_A_PROMPT)} -> {_shown(answer, _MOST_OF_AN_ANSWER)}"
            )
        for line in answers.alarms:
            self.note(f"step {answers.step}: {line}", "warning")

    def saved(self, step: int, folder: Path) -> None:
        self._print(f"step {step}: saved {folder.name}")

    def rewound(self, step: int, reason: str) -> None:
        self.ticked(step)

    def finished(self, files: Sequence[Path]) -> None:
        self._stop()

    def close(self) -> None:
        self._stop()

    def _numbers(self, report: StepReport) -> str:
        """As many numbers as the terminal's width has room for, the most wanted first."""
        rate = next(iter(report.learning_rates.values()), 0.0)
        parts = [
            f"loss {report.loss_smoothed:.4f}",
            f"lr {rate:.1e}",
            speed(report.rate, self._words),
            in_gib(report.memory.current_bytes),
            *use_of_time(report),
        ]
        # train, bar, steps, time left, and the gaps between them.
        taken = 5 + self._bar_width() + 2 * len(str(report.max_steps)) + 1 + len("0:00:00 left") + 5
        numbers = ""
        for part in parts:
            longer = f"{numbers}  {part}" if numbers else part
            if taken + len(longer) > self.console.width:
                break
            numbers = longer
        return numbers

    def _bar_width(self) -> int:
        return 30 if self.console.width >= _WIDE else 14

    def _bar(self) -> Progress:
        """The live display, started when it is first needed."""
        if self._progress is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
            from rich.text import Text

            class TimeLeft(ProgressColumn):
                def render(self, task: Task) -> Text:
                    eta = task.fields.get("eta")
                    if eta is None or task.finished:
                        return Text("")
                    return Text(f"{duration(max(0.0, eta - time.monotonic()))} left")

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=self._bar_width()),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
                TimeLeft(),
                console=self.console,
                refresh_per_second=4,
            )
            self._progress.start()
        return self._progress

    def _end_task(self, what: str) -> None:
        if self._progress is not None and what in self._tasks:
            self._progress.remove_task(self._tasks.pop(what)[0])

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = None
        self._tasks.clear()

    def _print(self, text: object) -> None:
        # Lines in a file are as long as they are; a terminal wraps them itself. Paths stay copyable in both.
        self.console.print(text, soft_wrap=True)

    def _print_facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """What and value in two aligned columns; Chinese characters count as two."""
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        if self.live:
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(style="bold", no_wrap=True)
            table.add_column(overflow="fold")
            for what, value in facts:
                table.add_row(Text(one_line(what)), Text(one_line(value)))
            self.console.print(table)
        else:
            labels = [one_line(what) for what, _ in facts]
            width = max((cell_len(label) for label in labels), default=0)
            for label, (_, value) in zip(labels, facts, strict=True):
                self._print(f"{label}{' ' * (width - cell_len(label))}  {one_line(value)}")


def _shown(text: str, most: int) -> str:
    return f'"{shortened(text, most)}"'


def _eta(spent_s: float, done: int, total: int) -> float | None:
    """When it will be done, on the monotonic clock."""
    return time.monotonic() + spent_s / done * (total - done) if done else None
