"""When the validation loss is measured, what it says about memorising, and when a run has nothing more to gain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lora_scripts.choosing.rule import beyond_noise
from lora_scripts.training.events import Events, Validation
from lora_scripts.training.validation import Estimate, memorised, paired
from lora_scripts.words import PICTURES, Words

if TYPE_CHECKING:
    from lora_scripts.training.loop import LoopState

__all__ = ["Judge", "num_stalled", "read_validations"]


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

    def summary(self, words: Words = PICTURES) -> list[str]:
        """What the measurements say about memorising, in one line, after the run."""
        history = read_validations(self._state)
        if len(history) < 2:
            return []
        first, last = history[0], history[-1]
        growth = memorised(last, first)
        learnt = beyond_noise(Estimate(-growth.mean, growth.error), len(last.held_out))
        by_heart = f"more than chance explains, so part of the {words.examples} was learnt by heart"
        verdict = by_heart if learnt else "within the noise"
        return [
            f"Held-out loss {first.loss:.4f} -> {last.loss:.4f}, on training {words.examples} {first.training_loss:.4f} -> "
            f"{last.training_loss:.4f}; the gap between them (memorisation) changed by {growth}, {verdict}."
        ]
