"""What a run tells the world while it goes on, and who listens.

The loop and the pipeline speak to `Events`; TensorBoard, train.log, the terminal and the report's record are listeners.
A listener overrides what it cares about. A new place to show progress is a new listener, not a change to the loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.dialogues.answers import Answer
    from lora_scripts.training.memory import MemoryReading
    from lora_scripts.training.throughput import Throughput

__all__ = ["Answers", "Events", "Listener", "Preview", "RunStart", "StepReport", "Validation"]

Level = Literal["info", "warning"]


@dataclass(frozen=True)
class RunStart:
    """What is known when the first step is about to be taken.

    Attributes:
        settings: every setting with the value in force, as text and numbers.
        facts: (what, value) pairs for people: base model, pictures, buckets, trainable weights, device.
        captions: (name, caption) of each picture as it trains, or of each dialogue what it says, shortened.
        first_step: steps already done by an earlier run in the same folder.
    """

    settings: Mapping[str, object]
    facts: Sequence[tuple[str, str]]
    captions: Sequence[tuple[str, str]]
    first_step: int
    max_steps: int


@dataclass(frozen=True)
class StepReport:
    """The steps since the last report.

    Attributes:
        step: optimizer steps done so far, so the first report of `log_steps: 10` says 10.
        losses: the mean loss of each step since the last report, oldest first; NaN for a step that was left out.
        loss_smoothed: exponential moving average of the losses (factor 0.98, bias corrected).
        grad_norm: of the last step, before it is shortened to `max_grad_norm`.
        rate: pictures, or learnt tokens, per second since the last report; previews and saves left out.
        eta_s: seconds until the last step at this speed, previews and saves left out.
        throughput: where the time went; None in records of older versions.
    """

    step: int
    max_steps: int
    epoch: float
    losses: Sequence[float]
    loss_smoothed: float
    learning_rates: Mapping[str, float]
    grad_norm: float
    rate: float
    eta_s: float
    memory: MemoryReading
    throughput: Throughput | None = None

    @property
    def loss(self) -> float:
        """Mean of the losses since the last report; NaN when all its steps were left out."""
        taken = [loss for loss in self.losses if math.isfinite(loss)]
        return sum(taken) / len(taken) if taken else math.nan


@dataclass(frozen=True)
class Preview:
    """Pictures rendered from fixed prompts and seeds with the adapter as it is after `step` steps."""

    step: int
    prompts: Sequence[str]
    images: Sequence[Image]


@dataclass(frozen=True)
class Answers:
    """What a language model says to fixed prompts after `step` steps, beside what it said before training.

    Attributes:
        prompts: for people.
        base, adapter: the answers to each prompt, in the same order.
        alarms: what is wrong with many of the adapter's answers and was not with the base model's, one line each.
        expected: what the data answer; empty texts where the prompt is not from the data.
    """

    step: int
    prompts: Sequence[str]
    base: Sequence[Answer]
    adapter: Sequence[Answer]
    alarms: Sequence[str] = ()
    expected: Sequence[str] = ()


@dataclass(frozen=True)
class Validation:
    """The validation loss after `step` steps.

    Attributes:
        held_out: mean loss of each held-out example, always in the same order.
        trained: the same of as many training examples; the n-th of both are measured with the same noise.
    """

    step: int
    held_out: Sequence[float]
    trained: Sequence[float]

    @property
    def loss(self) -> float:
        """Mean over the held-out examples."""
        return sum(self.held_out) / len(self.held_out)

    @property
    def training_loss(self) -> float:
        """Mean over the training examples."""
        return sum(self.trained) / len(self.trained)

    @property
    def gap(self) -> float:
        """How much worse the model does on examples that it was not trained on; what it grows by is memorisation."""
        return self.loss - self.training_loss


class Listener:
    """Base of all listeners; every method may be left as it is."""

    def note(self, text: str, level: Level = "info") -> None:
        """One or more lines for people."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Encoding or rendering goes on."""

    def started(self, run: RunStart) -> None:
        """The first step is about to be taken."""

    def ticked(self, step: int) -> None:
        """A step is done; no number is known yet, because fetching one would make the device wait."""

    def stepped(self, report: StepReport) -> None:
        """Numbers of the last few steps."""

    def validated(self, validation: Validation) -> None:
        """The validation loss was measured."""

    def previewed(self, preview: Preview) -> None:
        """Previews were rendered."""

    def answered(self, answers: Answers) -> None:
        """A language model was asked its prompts."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint is complete."""

    def rewound(self, step: int, reason: str) -> None:
        """The run has gone back to its state after `step` steps; what was told of later ones no longer holds."""

    def finished(self, files: Sequence[Path]) -> None:
        """The run ended well; these files were written, read back and compared."""

    def close(self) -> None:
        """The run is over, well or not."""


@dataclass
class Events(Listener):
    """Passes everything on to its listeners, in order."""

    listeners: list[Listener] = field(default_factory=list)

    def note(self, text: str, level: Level = "info") -> None:
        for listener in self.listeners:
            listener.note(text, level)

    def progress(self, what: str, done: int, total: int) -> None:
        for listener in self.listeners:
            listener.progress(what, done, total)

    def started(self, run: RunStart) -> None:
        for listener in self.listeners:
            listener.started(run)

    def ticked(self, step: int) -> None:
        for listener in self.listeners:
            listener.ticked(step)

    def stepped(self, report: StepReport) -> None:
        for listener in self.listeners:
            listener.stepped(report)

    def validated(self, validation: Validation) -> None:
        for listener in self.listeners:
            listener.validated(validation)

    def previewed(self, preview: Preview) -> None:
        for listener in self.listeners:
            listener.previewed(preview)

    def answered(self, answers: Answers) -> None:
        for listener in self.listeners:
            listener.answered(answers)

    def saved(self, step: int, folder: Path) -> None:
        for listener in self.listeners:
            listener.saved(step, folder)

    def rewound(self, step: int, reason: str) -> None:
        self.note(reason, "warning")
        for listener in self.listeners:
            listener.rewound(step, reason)

    def finished(self, files: Sequence[Path]) -> None:
        for listener in self.listeners:
            listener.finished(files)

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
