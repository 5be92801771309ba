"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

__all__ = ["SCHEDULES", "Schedule", "learning_rate_factor", "resolve_warmup"]

Schedule: TypeAlias = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex"
]

SCHEDULES: tuple[str, ...] = get_args(Schedule)

_MOST_AUTO_WARMUP_STEPS = 100
_AUTO_WARMUP_SHARE = 0.05


def resolve_warmup(warmup_steps: int | Literal["auto"], total_steps: int) -> int:
    """The number of warm-up steps; "auto" is 5 % of the run, at most 100 steps.

    Adam's second moments are settled after some tens of steps whatever the length of the run, hence the upper bound.
    """
    if warmup_steps == "auto":
        return min(int(_AUTO_WARMUP_SHARE * total_steps), _MOST_AUTO_WARMUP_STEPS)
    return warmup_steps


def learning_rate_factor(
    name: str,
    step: int,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    num_cycles: float | None = None,
    power: float = 1.0,
    final_factor: float = 0.0,
) -> float:
    """What the learning rate is multiplied by at one step.

    Args:
        name: one of `SCHEDULES`. "constant" has no warm-up.
        step: optimizer steps already taken: 0 for the first one, so a warm-up starts from zero.
        total_steps: optimizer steps in the whole run, warm-up included.
        warmup_steps: steps over which the factor rises in a straight line from 0 to 1.
        num_cycles: waves of the cosine, 0.5 (one descent) by default; hard restarts, 1 by default.
        power: exponent of "polynomial".
        final_factor: where "polynomial" ends, as a share of the learning rate.
    Raises:
        ValueError: no schedule has that name.
    Source: diffusers `optimization.py`, `get_scheduler`; "rex" is Chen et al. 2021, arXiv 2107.04197, section 3.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no learning-rate schedule is named {name!r}; known: {', '.join(SCHEDULES)}")
    if name == "constant":
        return 1.0
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if name == "constant_with_warmup":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match name:
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            cycles = 0.5 if num_cycles is None else num_cycles
            return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress)))
        case "cosine_with_restarts":
            cycles = 1 if num_cycles is None else num_cycles
            if progress >= 1.0:
                return 0.0
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))
        case "polynomial":
            if progress > 1.0:
                return final_factor
            return float((1.0 - final_factor) * (1.0 - progress) ** power + final_factor)
        case _:  # rex
            left = max(0.0, 1.0 - progress)
            return left / (0.5 + 0.5 * left)
