"""Which examples make up which optimizer step: a pure function of (data, seed, batch size), so resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Self

from lora_scripts.config import Size
from lora_scripts.data.captions import fraction

if TYPE_CHECKING:
    from lora_scripts.data.training_data import TrainingExample

__all__ = ["Sample", "StepPlan", "mean_uses", "total_uses"]


@dataclass(frozen=True)
class Sample:
    """One use of one example.

    Attributes:
        index: position in the data set.
        key: names this use (epoch, repeat, example); random draws belong to it.
        stratum: this use's own part of 0..1, as (start, width): the parts of a step's uses cover all of it.
    """

    index: int
    key: str
    stratum: tuple[float, float] = (0.0, 1.0)


def total_uses(examples: Sequence[TrainingExample]) -> int:
    """Uses of all examples in an epoch."""
    learnt = sum(example.repeats for example in examples if not example.is_regularization)
    return 2 * learnt if any(example.is_regularization for example in examples) else learnt


def mean_uses(examples: Sequence[TrainingExample]) -> list[float]:
    """Uses of each example in an epoch; of regularization ones on average."""
    learnt = sum(example.repeats for example in examples if not example.is_regularization)
    others = sum(example.repeats for example in examples if example.is_regularization)
    return [
        learnt * example.repeats / others if example.is_regularization else float(example.repeats)
        for example in examples
    ]


class StepPlan:
    """The examples of every optimizer step.

    Each epoch uses every example `repeats` times, and as many uses again come from regularization examples where there are
    some, as in kohya-ss/sd-scripts: these come in turn, so that where there are more of them than an epoch takes, the next
    epoch goes on with the others. A step holds `step_size` uses, of one bucket where possible; what is
    left over in the buckets at the end of an epoch is put together into mixed steps, so nothing is dropped. Micro-batches
    are cut from a step afterwards: batch 4 and 2 x 2 accumulated see the same steps.

    Attributes:
        seed: what order and strata follow from; noise follows from it too.
    """

    def __init__(
        self,
        names: Sequence[str],
        buckets: Sequence[Size],
        repeats: Sequence[int],
        step_size: int,
        seed: int,
        regularization: Sequence[int] = (),
    ) -> None:
        """Args:
        regularization: places of the examples that are for it.
        """
        assert len(names) == len(buckets) == len(repeats) > len(set(regularization))
        self._names, self._buckets, self._repeats = list(names), list(buckets), list(repeats)
        self._step_size, self.seed = step_size, seed
        others = set(regularization)
        self._learnt = [(i, r) for i in range(len(names)) if i not in others for r in range(repeats[i])]
        self._others = [(i, r) for i in sorted(others) for r in range(repeats[i])]
        self.uses_per_epoch = len(self._learnt) * (2 if others else 1)
        self.steps_per_epoch = len(self.epoch(0))

    @classmethod
    def of(cls, examples: Sequence[TrainingExample], step_size: int, seed: int) -> Self:
        """The plan for a data set."""
        return cls(
            [each.name for each in examples],
            [each.shape for each in examples],
            [each.repeats for each in examples],
            step_size,
            seed,
            [place for place, each in enumerate(examples) if each.is_regularization],
        )

    @lru_cache(maxsize=2)  # noqa: B019  one plan lives as long as the run
    def epoch(self, number: int) -> list[list[Sample]]:
        """All steps of one epoch, in order."""
        uses = [Sample(index, f"{number}/{repeat}/{self._names[index]}") for index, repeat in self._learnt]
        uses += self._regularization(number)
        uses.sort(key=lambda use: fraction(self.seed, "order", use.key))
        by_bucket: dict[Size, list[Sample]] = {}
        steps = []
        for use in uses:
            waiting = by_bucket.setdefault(self._buckets[use.index], [])
            waiting.append(use)
            if len(waiting) == self._step_size:
                steps.append(list(waiting))
                waiting.clear()
        left = [use for bucket in sorted(by_bucket) for use in by_bucket[bucket]]
        rest = [left[start : start + self._step_size] for start in range(0, len(left), self._step_size)]
        # Mixed steps are spread over the epoch, so that they are not always its end.
        for step in rest:
            place = int(fraction(self.seed, "place", number, step[0].key) * (len(steps) + 1))
            steps.insert(place, step)
        return [self._spread(step) for step in steps]

    def _regularization(self, number: int) -> list[Sample]:
        """As many uses of regularization examples as the epoch has of the others, from where the epoch before ended."""
        if not self._others:
            return []
        uses = []
        for place in range(number * len(self._learnt), (number + 1) * len(self._learnt)):
            turn, position = divmod(place, len(self._others))
            index, repeat = self._others[position]
            uses.append(Sample(index, f"{number}/{turn * self._repeats[index] + repeat}/{self._names[index]}"))
        return uses

    def _spread(self, step: Sequence[Sample]) -> list[Sample]:
        """The uses of a step, each with an equal part of 0..1; the parts are turned by a random amount in every step."""
        turn = fraction(self.seed, "stratum", step[0].key)
        width = 1 / len(step)
        return [replace(use, stratum=((place * width + turn) % 1.0, width)) for place, use in enumerate(step)]

    def step(self, number: int) -> list[Sample]:
        """The examples of optimizer step `number`, counted from 0 over the whole run."""
        epoch, place = divmod(number, self.steps_per_epoch)
        return self.epoch(epoch)[place]

    def micro_batches(self, step: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
        """The step cut into batches of one bucket each and at most `batch_size` examples."""
        by_bucket: dict[Size, list[Sample]] = {}
        for use in step:
            by_bucket.setdefault(self._buckets[use.index], []).append(use)
        for uses in by_bucket.values():
            for start in range(0, len(uses), batch_size):
                yield uses[start : start + batch_size]
