"""Measures the saved steps of a complete run, applies the rule, and puts the chosen step back into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from lora_scripts.choosing.held_out import held_out_measure
from lora_scripts.choosing.plan import regular_steps
from lora_scripts.choosing.rule import Choice, Measure, choose
from lora_scripts.config import RunConfig
from lora_scripts.errors import LoraScriptsError
from lora_scripts.training.checkpoint import saved_steps
from lora_scripts.training.micro_batches import is_out_of_memory
from lora_scripts.training.ranking import read_validations

if TYPE_CHECKING:
    from lora_scripts.tasks.protocol import Previewing
    from lora_scripts.training.events import Events
    from lora_scripts.training.loop import LoopState
    from lora_scripts.training.resume import Resumable

__all__ = ["Chooser", "Comparison"]


class Comparison(Protocol):
    """Compares saved steps by what they make, beside their held-out loss.

    Attributes:
        by: what is compared, in the plural: "pictures".
        caption_hits: example's name -> share of the other captions that its own beats, where that became known.
    """

    by: str
    caption_hits: Mapping[str, float]

    def measure(self, by_loss: Measure | None, saved: Sequence[int], last: int) -> Measure | None:
        """The measure, or None where it cannot be trusted or the run is too short to pay for it."""
        ...


class Chooser:
    """Chooses among the saved steps when the run is complete, and puts the chosen one back into the model."""

    def __init__(
        self,
        config: RunConfig,
        comparison: Comparison | None,
        run_state: Resumable,
        previews: Previewing,
        events: Events,
    ) -> None:
        self._config, self._comparison = config, comparison
        self._run_state, self._previews, self._events = run_state, previews, events

    @property
    def caption_hits(self) -> Mapping[str, float]:
        return self._comparison.caption_hits if self._comparison is not None else {}

    def put_best_back(self, state: LoopState) -> Choice:
        """Makes the model that of the best saved step, and says which it is and why."""
        if self._config.keep == "last":
            return Choice(state.step, "")
        last = state.step
        saved = regular_steps(saved_steps(self._config.output_dir), self._config.save_steps, last)
        measures = self._measures(state, saved, last)
        if not measures and not state.validations:
            return Choice(last, "")
        while True:
            choice = choose(measures, saved, last)
            if choice.step == last or self._run_state.put_back(choice.step):
                break
            saved.remove(choice.step)  # damaged since it was written: the next best
        self._events.note(choice.why)
        if choice.step != last:
            self._previews.repeat(choice.step)
        return choice

    def _measures(self, state: LoopState, saved: list[int], last: int) -> list[Measure]:
        if len(saved) < 2:
            return []
        by_loss = held_out_measure(read_validations(state), saved, last, self._config.words.examples)
        measures = [by_loss] if by_loss is not None else []
        if self._comparison is None:
            return measures
        # A finished run is not lost because what it makes cannot be compared.
        by = self._comparison.by
        try:
            by_making = self._comparison.measure(by_loss, saved, last)
        except LoraScriptsError as error:
            self._events.note(f"Saved steps are not compared by their {by}: {error}", "warning")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._events.note(f"Saved steps are not compared by their {by}: memory ran out.", "warning")
        else:
            measures += [by_making] if by_making is not None else []
        return measures
