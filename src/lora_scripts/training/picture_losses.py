"""How well each picture is fitted, from the losses that training computes anyway.

A picture's losses cannot be compared as they are: the noise level alone moves them by a factor of ten. So the logarithm of
every loss is compared with the mean logarithm at its part of the noise range, and a picture's fit is the mean of its
differences: 0 for an ordinary picture, 0.69 for one whose loss is twice what is usual at the same noise levels.

Losses stay on the device until a report or a save fetches them in one piece, so a step waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, pvariance
from typing import TYPE_CHECKING, Any

import torch

from lora_scripts.processes import ONE, Processes

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.data.sampler import Sample
    from lora_scripts.families.protocol import Loss

__all__ = ["PictureFit", "PictureLosses", "picture_fits"]

NUM_BINS = 20
"""Parts of the noise range; within one, losses of one picture differ by chance more than by their level."""
SMALLEST_LOSS = 1e-12
FEWEST_USES = 3
"""Below this, one unlucky draw of the noise decides."""
FAR_OUT = 3.5
"""A fit is outlying from so many deviations on (Iglewicz and Hoaglin 1993, on the modified z-score)."""
MAD_TO_DEVIATION = 1.4826


class PictureLosses:
    """Collects (picture, noise level, loss) of the steps that are taken; what it knows is plain numbers for the checkpoint."""

    def __init__(self, num_pictures: int, state: Mapping[str, Any]) -> None:
        """Args:
        state: as the property of that name gave it; empty at the beginning, and in checkpoints of versions that did not keep it.
        """
        self._bins = [list(row) for row in state.get("bins", [[0, 0.0, 0.0] for _ in range(NUM_BINS)])]
        self._sums = list(state.get("sums", [0.0] * num_pictures))
        self._counts = [_numbers(row) for row in state.get("counts", [" ".join("0" * NUM_BINS)] * num_pictures)]
        self._of_step: list[tuple[list[int], Tensor]] = []
        self._waiting: list[tuple[list[int], Tensor]] = []

    def begin(self) -> None:
        """A step begins, for the first time or once more: what it gave so far does not count."""
        self._of_step = []

    def add(self, uses: Sequence[Sample], loss: Loss) -> None:
        """Takes in one micro-batch without looking at its numbers."""
        levels = torch.full_like(loss.per_example, 0.5) if loss.levels is None else loss.levels.to(loss.per_example)
        self._of_step.append(([use.index for use in uses], torch.stack([loss.per_example, levels])))

    def keep(self) -> None:
        """The step was taken: its losses count."""
        self._waiting += self._of_step
        self._of_step = []

    def fetch(self, processes: Processes = ONE) -> None:
        """Counts what lies on the device, in this process and all others; waits for it once."""
        for pictures, losses, levels in processes.gather(self._fetched()):
            for index, loss, level in zip(pictures, losses, levels, strict=True):
                self._count(index, math.log(max(loss, SMALLEST_LOSS)), min(int(level * NUM_BINS), NUM_BINS - 1))
        self._waiting = []

    def _fetched(self) -> tuple[list[int], list[float], list[float]]:
        """Pictures, losses and noise levels that wait, as plain numbers."""
        if not self._waiting:
            return [], [], []
        losses, levels = torch.cat([numbers for _, numbers in self._waiting], dim=1).double().tolist()
        return [index for indices, _ in self._waiting for index in indices], losses, levels

    @property
    def state(self) -> dict[str, Any]:
        """All that was fetched so far, for the checkpoint.

        "bins": per part of the noise range, how many losses there were, the sum of their logarithms and of the squares;
        "sums": per picture, the sum of its losses' logarithms; "counts": per picture, its losses in each part, as one
        text, because a checkpoint's state file puts every number of a list on a line of its own.
        """
        return {
            "bins": [list(row) for row in self._bins],
            "sums": list(self._sums),
            "counts": [" ".join(map(str, row)) for row in self._counts],
        }

    def _count(self, index: int, log_loss: float, bin_: int) -> None:
        row = self._bins[bin_]
        row[0] += 1
        row[1] += log_loss
        row[2] += log_loss**2
        self._sums[index] += log_loss
        self._counts[index][bin_] += 1


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@dataclass(frozen=True)
class PictureFit:
    """How well one picture is fitted.

    Attributes:
        index: position among the training pictures.
        ratio: its loss as a multiple of the usual one at the same noise levels (geometric mean).
        error: standard error of the ratio.
        uses: losses that went into it.
        outlying: far above the other pictures, by more than its own error explains.
    """

    index: int
    ratio: float
    error: float
    uses: int
    outlying: bool


def picture_fits(state: Mapping[str, Any]) -> list[PictureFit]:
    """Every picture that was used often enough, the worst fitted first; empty for the state of an older checkpoint."""
    if not state:
        return []
    means, variances = [], []
    for count, total, squares in state["bins"]:
        mean = total / count if count else 0.0
        means.append(mean)
        variances.append(max(squares / count - mean**2, 0.0) if count else 0.0)
    sums_and_counts = [(total, _numbers(row)) for total, row in zip(state["sums"], state["counts"], strict=True)]
    fitted = {
        index: (total - sum(n * mean for n, mean in zip(counts, means, strict=True))) / sum(counts)
        for index, (total, counts) in enumerate(sums_and_counts)
        if sum(counts) >= FEWEST_USES
    }
    if not fitted:
        return []
    middle = median(fitted.values())
    deviation = MAD_TO_DEVIATION * median(abs(fit - middle) for fit in fitted.values())
    between = pvariance(fitted.values())  # what pictures differ by is no noise of their means
    fits = []
    for index, fit in fitted.items():
        counts = sums_and_counts[index][1]
        noise = sum(n * max(variance - between, 0.0) for n, variance in zip(counts, variances, strict=True))
        error = math.sqrt(noise) / sum(counts)
        outlying = fit - middle > FAR_OUT * max(deviation, error)
        fits.append(PictureFit(index, math.exp(fit), math.exp(fit) * error, sum(counts), outlying))
    return sorted(fits, key=lambda each: (-each.ratio, each.index))
