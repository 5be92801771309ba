"""A predicted plan put to the test: trial passes say how far the prediction is off, until a plan holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lora_scripts.planning.memory_plan import SCRATCH, MemoryNeeds, MemoryPlan

__all__ = ["settle"]

MOST_TRIALS = 5
OUT_OF_MEMORY = 1.3
"""A pass that ran out of memory is taken to need so much more than was thought."""


def settle(
    needs: MemoryNeeds, choose: Callable[[MemoryNeeds], MemoryPlan], measure: Callable[[MemoryPlan], int | None]
) -> MemoryPlan:
    """The plan that is chosen again after it was measured.

    Args:
        choose: the best plan for such needs.
        measure: the bytes that a pass of this plan takes, weights left out; None when memory ran out.
    """
    factor, plan, measured = SCRATCH, choose(needs), False
    for _ in range(MOST_TRIALS):
        taken = measure(plan)
        if taken is None:
            factor = max(factor, needs.factor) * OUT_OF_MEMORY
        else:
            ratio = taken / max(1, needs.of_pass(*plan.cut))
            # The first measurement replaces the guess; later ones may only make it more careful, or two plans that
            # each speak for the other would take turns.
            factor = max(factor, ratio) if measured else ratio
            measured = True
        needs = replace(needs, factor=factor)
        again = replace(choose(needs), measured=measured)
        if again.cut == plan.cut:
            return again
        plan = again
    return plan
