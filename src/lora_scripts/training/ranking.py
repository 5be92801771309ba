"""Which saved step becomes the finished file, and when a run has nothing more to gain.

The rule is on the side of the last step: style is learnt late, and a small held-out set is noisy. An earlier step is chosen
only when its loss on the same pictures with the same noise is lower by more than the scatter between pictures explains,
and by an amount that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lora_scripts.training.events import Events, Validation
from lora_scripts.training.validation import Estimate, memorised, paired

if TYPE_CHECKING:
    from lora_scripts.training.loop import LoopState

__all__ = ["Choice", "Judge", "beyond_noise", "choose", "num_stalled", "read_validations"]

# One-sided 95 % points of Student's t by degrees of freedom: with two pictures a difference must be large to mean anything.
_T95 = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89, 8: 1.86, 9: 1.83, 10: 1.81}
_T95_MANY = 1.75
SMALLEST_GAIN = 0.02
"""Share of the held-out loss by which an earlier step must be lower: with two pictures a difference far too small to be
seen can agree by chance to the fourth digit."""


@dataclass(frozen=True)
class Choice:
    """A step, and one or two sentences on why it was chosen and how sure that is."""

    step: int
    why: str


def beyond_noise(change: Estimate, num_pictures: int) -> bool:
    """Whether a mean change is below zero by more than chance explains (one-sided, 5 %, t over pictures)."""
    return change.mean < -_T95.get(num_pictures - 1, _T95_MANY) * change.error


def choose(validations: Sequence[Validation], saved: Collection[int], last: int) -> Choice:
    """The last step, or the saved step with the lowest held-out loss where that is lower beyond the noise and by more than 2 %."""
    measured = {each.step: each for each in validations if each.step in saved}
    if last not in measured or len(measured) < 2:
        return Choice(last, f"Step {last}, the last one, is the finished file; there is no measurement to choose by.")
    final = measured[last]
    changes = {step: paired(each.held_out, final.held_out) for step, each in measured.items() if step != last}
    better = [
        step
        for step, change in changes.items()
        if beyond_noise(change, len(final.held_out)) and -change.mean > SMALLEST_GAIN * final.loss
    ]
    if not better:
        nearest = min(changes, key=lambda step: changes[step].mean)
        return Choice(
            last,
            f"Step {last}, the last one, is the finished file: no earlier saved step has a held-out loss lower by 2 % and beyond the noise "
            f"(step {nearest} comes nearest, {changes[nearest]} on {len(final.held_out)} pictures).",
        )
    best = min(better, key=lambda step: changes[step].mean)
    return Choice(
        best,
        f"Step {best} is the finished file, not the last one ({last}): its held-out loss is {measured[best].loss:.4f} instead of "
        f"{final.loss:.4f} ({changes[best]} on {len(final.held_out)} pictures, beyond the noise), so what followed was overtraining.",
    )


def num_stalled(validations: Sequence[Validation]) -> int:
    """How many measurements in a row, up to the newest, were no better beyond the noise than the best before them."""
    best, stalled = validations[0], 0
    for each in validations[1:]:
        if beyond_noise(paired(each.held_out, best.held_out), len(each.held_out)):
            best, stalled = each, 0
        else:
            stalled += 1
    return stalled


def read_validations(state: LoopState) -> list[Validation]:
    """The measurements that the loop's state carries."""
    return [Validation(**each) for each in state.validations]


class Judge:
    """Measures when the loop asks, keeps the measurements in its state, and says when the run has nothing more to gain."""

    def __init__(
        self,
        measure: Callable[[int], Validation],
        state: LoopState,
        early_stopping: int,
        saved: Callable[[int], Collection[int]],
        events: Events,
    ) -> None:
        """Args:
        saved: the steps that are saved, or will be after the given one.
        """
        self._measure, self._state, self._patience = measure, state, early_stopping
        self._saved, self._events = saved, events

    def validate(self, step: int) -> bool:
        """True when early stopping ends the run."""
        state, now = self._state, self._measure(step)
        state.validations = [*state.validations, asdict(now)]
        self._events.validated(now)
        history = read_validations(state)
        candidates = [each for each in history if each.step in self._saved(step)]
        # Kept from pruning: the lowest so far, because whether the last one is good enough is known only at the end.
        state.best_step = min(candidates, key=lambda each: each.loss).step if candidates else None
        stalled = num_stalled(history)
        if not self._patience or stalled < self._patience:
            return False
        self._events.note(
            f"Early stopping after step {step}: {stalled} measurements in a row without a lower held-out loss beyond the noise."
        )
        return True

    def summary(self) -> list[str]:
        """What the measurements say about memorising, in one line, after the run."""
        history = read_validations(self._state)
        if len(history) < 2:
            return []
        first, last = history[0], history[-1]
        growth = memorised(last, first)
        learnt = beyond_noise(Estimate(-growth.mean, growth.error), len(last.held_out))
        verdict = (
            "more than chance explains, so part of the pictures was learnt by heart" if learnt else "within the noise"
        )
        return [
            f"Held-out loss {first.loss:.4f} -> {last.loss:.4f}, on training pictures {first.training_loss:.4f} -> "
            f"{last.training_loss:.4f}; the gap between them (memorisation) changed by {growth}, {verdict}."
        ]
