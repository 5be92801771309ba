"""The rule: the last step, unless an earlier one is better by an amount that matters and beyond the noise.

Style is learnt late and every measurement is noisy, so the rule is on the side of the last step. Each measure says by how
much a step is better than the last one, picture by picture, in units of the smallest difference that matters. The mean of
these, weighted by how far each measure can be trusted, is the step's gain. It rises with every measure, and an earlier step
is chosen only when its gain is above 1 and above what chance explains.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lora_scripts.training.validation import Estimate, paired

__all__ = ["Choice", "Gain", "Measure", "StepScore", "beyond_noise", "choose", "gain"]

# One-sided 95 % points of Student's t by degrees of freedom: with two pictures a difference must be large to mean anything.
_T95 = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89, 8: 1.86, 9: 1.83, 10: 1.81}
_T95_MANY = 1.75
FEWEST = 2
"""Pictures without which a measure has no noise that could be known, and so no say."""


def t95(freedom: int) -> float:
    """The one-sided 95 % point of Student's t."""
    return _T95.get(max(1, freedom), _T95_MANY)


def beyond_noise(change: Estimate, num_pictures: int) -> bool:
    """Whether a mean change is below zero by more than chance explains (one-sided, 5 %, t over pictures)."""
    return change.mean < -t95(num_pictures - 1) * change.error


@dataclass(frozen=True)
class Measure:
    """One way to compare saved steps.

    Attributes:
        values: step -> one number per picture or prompt, the same ones in the same order at every step; more is better.
        notable: the smallest difference of two steps' means that matters.
        weight: how much the measure can be trusted, 0..1.
        shown: step -> (what, value) pairs for people.
        about: a sentence on how it was measured.
    """

    name: str
    values: Mapping[int, Sequence[float]]
    notable: float
    weight: float = 1.0
    shown: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class Gain:
    """How much better a step is than the last one, in notable differences.

    Attributes:
        total: the weighted mean over the measures, with its standard error.
        needed: standard errors that it must be above zero by, to be beyond the noise.
        parts: measure -> what it adds to the mean.
    """

    total: Estimate
    needed: float
    parts: Mapping[str, Estimate]

    @property
    def convinces(self) -> bool:
        """Whether the step is better by more than a notable difference, and beyond the noise."""
        return self.total.mean > 1 and self.total.mean > self.needed * self.total.error


@dataclass(frozen=True)
class StepScore:
    """What is known of a saved step, for the table in the report.

    Attributes:
        values: (what, value) as they are shown.
        gain: None for the last step, which the others are compared with.
    """

    step: int
    values: Sequence[tuple[str, str]]
    gain: Gain | None


@dataclass(frozen=True)
class Choice:
    """A step, one or two sentences on why it was chosen and how sure that is, and the figures behind it."""

    step: int
    why: str
    scores: Sequence[StepScore] = ()


def gain(measures: Sequence[Measure], step: int, last: int) -> Gain | None:
    """How much better a step is than the last one; None when a measure lacks one of the two, or there is none.

    The errors of the measures are independent and combined as such. The degrees of freedom are those of the measure that
    has fewest: Welch's, which weigh them by the errors, trust the error of two held-out pictures as soon as it is small,
    and that of two is often small by chance.
    """
    weights = sum(measure.weight for measure in measures)
    parts = {}
    for measure in measures:
        if step not in measure.values or last not in measure.values:
            return None
        change = paired(measure.values[step], measure.values[last])
        scale = measure.weight / weights / measure.notable
        parts[measure.name] = Estimate(scale * change.mean, scale * change.error)
    if not parts:
        return None
    error = math.sqrt(sum(part.error**2 for part in parts.values()))
    fewest = min(len(measure.values[last]) for measure in measures)
    return Gain(Estimate(sum(part.mean for part in parts.values()), error), t95(fewest - 1), parts)


def choose(measures: Sequence[Measure], saved: Collection[int], last: int) -> Choice:
    """The last step, or the saved step with the largest gain where that convinces."""
    usable = [each for each in measures if each.weight > 0 and len(each.values.get(last, ())) >= FEWEST]
    found = {step: each for step in sorted(saved) if step != last and (each := gain(usable, step, last)) is not None}
    if not found:
        return Choice(last, f"Step {last}, the last one, is the finished file; there is no measurement to choose by.")
    scores = [StepScore(step, _shown(usable, step), found.get(step)) for step in sorted({*found, last})]
    about = " ".join(each.about for each in usable if each.about)
    best = max(found, key=lambda step: found[step].total.mean)
    convincing = [step for step, each in found.items() if each.convinces]
    if not convincing:
        why = (
            f"Step {last}, the last one, is the finished file: no earlier saved step is better by a difference that matters "
            f"and beyond the noise. Step {best} comes nearest: {_told(usable, found[best], best, last)}. {about}"
        )
        return Choice(last, why.strip(), scores)
    best = max(convincing, key=lambda step: found[step].total.mean)
    why = (
        f"Step {best} is the finished file, not the last one ({last}): {_told(usable, found[best], best, last)}. That is beyond "
        f"the noise, so what followed was overtraining. {about}"
    )
    return Choice(best, why.strip(), scores)


def _told(measures: Sequence[Measure], gain: Gain, step: int, last: int) -> str:
    """What differs between two steps, and how sure that is, in words."""
    then = dict(_shown(measures, last))
    figures = ", ".join(f"{what} {value} instead of {then[what]}" for what, value in _shown(measures, step))
    spread = (
        f"{abs(gain.total.mean) / gain.total.error:.1f} standard errors" if gain.total.error else "no spread at all"
    )
    shares = [f"{part.mean:+.1f} by {name}" for name, part in gain.parts.items()] if len(gain.parts) > 1 else []
    return (
        f"{figures}; in all {gain.total.mean:+.1f} ± {gain.total.error:.1f} times the smallest difference that matters "
        f"({', '.join([*shares, spread])}, {gain.needed:.1f} are needed)"
    )


def _shown(measures: Sequence[Measure], step: int) -> list[tuple[str, str]]:
    return [pair for measure in measures for pair in measure.shown.get(step, ())]
