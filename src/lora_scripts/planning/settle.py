"""A predicted plan put to the test: trial passes say how far the prediction is off, until a plan holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lora_scripts.planning.memory_plan import MemoryNeeds, MemoryPlan

__all__ = ["settle"]

MOST_TRIALS = 12
OUT_OF_MEMORY = 1.05
"""A pass that ran out of memory is taken to need a little more than all there was, so that a smaller one comes next."""


def settle(
    needs: MemoryNeeds, choose: Callable[[MemoryNeeds], MemoryPlan], measure: Callable[[MemoryPlan], int | None]
) -> MemoryPlan:
    """The plan that is chosen again after it was measured.

    Args:
        choose: the best plan for such needs.
        measure: the bytes that a pass of this plan takes, weights left out; None when memory ran out.
    """
    plan, known, measured = choose(needs), 0.0, False
    for _ in range(MOST_TRIALS):
        taken, predicted = measure(plan), max(1, needs.of_pass(*plan.cut))
        if taken is None:
            room = plan.budget_bytes - needs.weights - needs.optimizer
            ratio = max(needs.factor, room / predicted) * OUT_OF_MEMORY
        else:
            ratio, measured = taken / predicted, True
        # What the first trial says replaces the guess; later ones may only make it more careful, or two plans that each
        # speak for the other would take turns.
        known = max(known, ratio)
        needs = replace(needs, factor=known)
        again = replace(choose(needs), measured=measured)
        if again.cut == plan.cut:
            return again
        plan = again
    return plan
