"""A run with a listener that keeps what it is told, for tests that look at it."""

from __future__ import annotations

import os
import signal
from typing import Any

from lora_scripts.config import RunConfig
from lora_scripts.train_command import train_and_report
from lora_scripts.training.events import Listener, StepReport, Validation

__all__ = ["Seen", "StopAfter", "train"]


class Seen(Listener):
    """Keeps reports, measurements and notes, in order."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.validations: list[Validation] = []
        self.notes: list[str] = []

    def stepped(self, report: StepReport) -> None:
        self.reports.append(report)

    def validated(self, validation: Validation) -> None:
        self.validations.append(validation)

    def note(self, text: str, level: str = "info") -> None:
        self.notes.append(text)


class StopAfter(Listener):
    """Asks the run to stop, as Ctrl-C does, after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def ticked(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def train(values: dict[str, Any], *more: Listener) -> Seen:
    """The whole training command on these settings, and what it told."""
    seen = Seen()
    train_and_report(RunConfig.model_validate(values), more=[seen, *more])
    return seen
