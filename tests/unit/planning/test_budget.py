"""How much memory a run may count on."""

from __future__ import annotations

import torch

from lora_scripts.planning.budget import USABLE, available_memory, memory_budget

CPU = torch.device("cpu")


def test_available_memory_is_that_of_this_machine() -> None:
    assert 10**8 < available_memory() < 10**14


def test_what_the_run_holds_already_counts_as_its_own() -> None:
    held = 10**12
    assert memory_budget(CPU, None, held) > USABLE * held


def test_limit_makes_the_budget_smaller_and_never_larger() -> None:
    assert memory_budget(CPU, 0.001, 0) == 1_000_000
    assert memory_budget(CPU, 1e9, 0) <= USABLE * 10**15
