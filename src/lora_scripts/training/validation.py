"""The validation loss: the same noise on the same pictures at every measurement, so that only the adapter differs.

The loss of training steps says little: it moves with the noise levels that a step happens to draw. Here a few held-out
pictures and as many training pictures are measured at fixed (noise level, noise) pairs. Held-out loss that rises while
training loss falls means that the pictures are learnt by heart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

import torch

from lora_scripts.data.sampler import Sample
from lora_scripts.families.protocol import ModelFamily
from lora_scripts.processes import ONE, Processes
from lora_scripts.training.draws import Draws
from lora_scripts.training.events import Validation
from lora_scripts.training.optimizers import evaluation_weights

if TYPE_CHECKING:
    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.data.split import Split
    from lora_scripts.data.training_data import TrainingData

__all__ = [
    "FORWARD_SHARE",
    "LARGEST_SHARE",
    "Estimate",
    "ValidationPlan",
    "Validator",
    "memorised",
    "paired",
    "plan_validation",
]

LARGEST_SHARE = 0.025
"""Of the run's time, for all measurements together, as planned: 3 % was measured as 3.2, and 3 is what is promised."""
FORWARD_SHARE = 0.4
"""Time of a forward pass, as a share of forward and backward through frozen layers with an adapter."""
MOST_PAIRS, ENOUGH_PAIRS = 16, 4
MEASURED_SEED = 20_240


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures and its standard error; the error is infinite for a single picture."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}" if math.isfinite(self.error) else f"{self.mean:+.4f}"


def paired(now: Sequence[float], then: Sequence[float]) -> Estimate:
    """The mean difference now - then, picture by picture: what pictures have in common cancels out."""
    changes = [a - b for a, b in zip(now, then, strict=True)]
    error = stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.inf
    return Estimate(fmean(changes), error)


def memorised(now: Validation, first: Validation) -> Estimate:
    """By how much the gap between held-out and training pictures has grown since before the first step."""
    return paired(
        [h - t for h, t in zip(now.held_out, now.trained, strict=True)],
        [h - t for h, t in zip(first.held_out, first.trained, strict=True)],
    )


@dataclass(frozen=True)
class ValidationPlan:
    """When to measure and how often; `every` 0 means never.

    Attributes:
        num_pairs: (noise level, noise) pairs per picture.
        share: of the run's time that the measurements take, estimated.
    """

    every: int
    num_pairs: int
    share: float


def plan_validation(
    wanted: int | Literal["auto"],
    num_held_out: int,
    max_steps: int,
    step_size: float,
    save_steps: int,
    most_pairs: int = MOST_PAIRS,
) -> ValidationPlan:
    """Measures at every save if that is affordable, more seldom if not, with as many pairs as the budget allows.

    A period that the user wrote is kept; its cost is then bounded by the number of pairs alone, with one at least.
    """
    if not num_held_out or wanted == 0:
        return ValidationPlan(0, 0, 0.0)
    most = min(most_pairs, MOST_PAIRS)
    run = max_steps * step_size / FORWARD_SHARE  # in forward passes of one picture

    def cost(every: int, num_pairs: int) -> float:
        times = 1 + -(-max_steps // every)  # before the first step, every so often, and at the end
        return times * 2 * num_held_out * num_pairs / run

    if wanted != "auto":
        pairs = max((n for n in range(1, most + 1) if cost(wanted, n) <= LARGEST_SHARE), default=1)
        return ValidationPlan(wanted, pairs, cost(wanted, pairs))
    periods = [save_steps * k for k in range(1, -(-max_steps // save_steps) + 1)]
    for fewest in (min(ENOUGH_PAIRS, most), 1):
        for every in periods:
            pairs = max((n for n in range(fewest, most + 1) if cost(every, n) <= LARGEST_SHARE), default=0)
            if pairs:
                return ValidationPlan(every, pairs, cost(every, pairs))
    return ValidationPlan(0, 0, 0.0)


@dataclass(frozen=True)
class _Use:
    """One example at one (noise level, noise) pair.

    Attributes:
        number: of its example among all that are measured.
        level: as a share 0..1 of the trained range.
    """

    data: TrainingData
    number: int
    sample: Sample
    level: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.examples[self.sample.index].shape


class Validator:
    """Measures the model as it is; draws nothing from any generator and leaves weights and moments alone."""

    def __init__(
        self,
        family: ModelFamily,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        split: Split,
        plan: ValidationPlan,
        batch_size: int,
        device: torch.device,
        processes: Processes = ONE,
    ) -> None:
        assert split.held_out is not None
        self._family, self._adapter, self._optimizer = family, adapter, optimizer
        self._num_pairs, self._batch_size, self._device = plan.num_pairs, batch_size, device
        self._processes = processes
        self._num_held_out = len(split.held_out.examples)
        self._uses = [
            *self._uses_of(split.held_out, range(self._num_held_out), 0),
            *self._uses_of(split.train, split.reference, self._num_held_out),
        ]

    def measure(self, step: int) -> Validation:
        """Plain mean squared errors, one per picture: no loss weights, no caption dropout, no adapter dropout.

        To be called in every process: each computes its share, and all get the whole.

        Raises:
            LostProcessError: a process has ended.
        """
        losses: dict[int, list[float]] = defaultdict(list)
        for use, loss in zip(self._uses, self._processes.joined(self._losses_of_share()), strict=True):
            losses[use.number].append(loss)
        means = [sum(losses[number]) / self._num_pairs for number in sorted(losses)]
        return Validation(step, means[: self._num_held_out], means[self._num_held_out :])

    def _uses_of(self, data: TrainingData, indices: Sequence[int], first: int) -> list[_Use]:
        """Every pair of every picture, shapes together, so that passes are full; in either group the n-th gets the n-th noise."""
        plain = data.as_written()
        uses = [
            _Use(plain, first + place, Sample(index, f"validation/{place}/{pair}"), (pair + 0.5) / self._num_pairs)
            for place, index in enumerate(indices)
            for pair in range(self._num_pairs)
        ]
        return sorted(uses, key=lambda use: use.shape)

    @torch.no_grad()
    def _losses_of_share(self) -> list[float]:
        """Of the uses that this process computes; further passes are made where the others need it for theirs."""
        processes, losses = self._processes, []
        with evaluation_weights(self._optimizer), self._adapter.strength(1.0), processes.passing():
            for uses in self._passes(processes.share(self._uses)):
                losses += self._losses(uses)
            for _ in range(processes.idle_passes(self._uses, lambda share: len(self._passes(share)))):
                self._losses(self._uses[:1])
        return losses

    def _passes(self, uses: Sequence[_Use]) -> list[list[_Use]]:
        passes: list[list[_Use]] = []
        for use in uses:
            last = passes[-1] if passes else []
            if not last or len(last) == self._batch_size or last[0].data is not use.data or last[0].shape != use.shape:
                passes.append([])
            passes[-1].append(use)
        return passes

    def _losses(self, uses: Sequence[_Use]) -> list[float]:
        batch = uses[0].data.batch([use.sample for use in uses], self._device).at_levels([use.level for use in uses])
        losses: list[float] = self._family.loss(batch, Draws(MEASURED_SEED)).per_example.tolist()
        return losses
