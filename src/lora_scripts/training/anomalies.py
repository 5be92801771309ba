"""Steps that must not be taken: a loss or gradient that is not a number, or far beyond what the run has shown so far.

The guard looks at two numbers before the optimizer moves. What it refuses leaves weights, moments and averages as they
were; refused again and again, the run goes back to its last saved state with a lower rate, and then ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

__all__ = ["Action", "Guard", "Verdict"]

WINDOW = 64
"""Accepted steps whose loss and gradient norm are remembered."""
WARM_UP = 16
"""Accepted steps before a large number can be told from a usual one; what is not a number is refused from the start."""
BEYOND_MEDIAN = 10.0
BEYOND_LARGEST = 2.0
"""A value is refused when it is above both `BEYOND_MEDIAN` times the median and `BEYOND_LARGEST` times the largest of the window.

With one picture per step the noise level alone moves an ordinary loss to about ten times the median, so the median is not
enough; and the largest alone would let one outlier hide the next. A spike to 20 times a usual loss is beyond both, even
in a step whose own loss is half the median.
"""
MOST_ANOMALIES = 3
WITHIN_STEPS = 50
LOWER_RATE = 0.5


class Action(Enum):
    """What the loop does with a step."""

    TAKE = "take"
    SKIP = "skip"
    GO_BACK = "go back"
    END = "end"


@dataclass(frozen=True)
class Verdict:
    """An action, with the reason for people where the step is not taken."""

    action: Action
    reason: str = ""


@dataclass
class Guard:
    """Judges every step; all its fields are plain numbers and go into the checkpoint.

    Attributes:
        losses, grad_norms: of the last `WINDOW` accepted steps.
        refused: the steps refused within the last `WITHIN_STEPS`.
        num_refused: in the whole run.
        rate: factor on the learning rate; below 1 once the run had to go back.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    num_refused: int = 0
    rate: float = 1.0

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """What to do with step `step` (counted from 0), before anything of it has reached weights or averages."""
        fault = _fault("loss", loss, self.losses) or _fault("gradient norm", grad_norm, self.grad_norms)
        if fault is None:
            self.losses = [*self.losses[1 - WINDOW :], loss]
            self.grad_norms = [*self.grad_norms[1 - WINDOW :], grad_norm]
            return Verdict(Action.TAKE)
        self.refused = [*(earlier for earlier in self.refused if earlier > step - WITHIN_STEPS), step]
        self.num_refused += 1
        if len(self.refused) < MOST_ANOMALIES:
            return Verdict(Action.SKIP, fault)
        return Verdict(Action.GO_BACK if self.rate == 1.0 else Action.END, fault)

    def lower_rate(self) -> None:
        """The rate for what follows, after going back; the refused steps are behind."""
        self.rate *= LOWER_RATE
        self.refused = []


def _fault(what: str, value: float, usual: Sequence[float]) -> str | None:
    """Why a value cannot be accepted, or None."""
    if not math.isfinite(value):
        return f"the {what} is not a finite number ({value})"
    if len(usual) < WARM_UP:
        return None
    middle = median(usual)
    if value > max(BEYOND_MEDIAN * middle, BEYOND_LARGEST * max(usual)) and middle > 0:
        return f"the {what} is {value:.4g}, {value / middle:.0f} times the usual {middle:.4g}"
    return None
