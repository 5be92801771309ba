"""The number that `block_swap: auto` stands for: the fewest blocks with which a run is predicted to fit.

It is chosen before any weight is read, because a model that does not fit cannot be loaded first. Swapping comes last of what
leaves the result as it is: smaller passes cost next to nothing and checkpointing a third more time, while every swapped block
crosses the bus twice in every pass. So blocks are swapped only where the smallest pass with checkpointing does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_scripts.planning.activations import UnpredictableError
from lora_scripts.planning.budget import memory_budget
from lora_scripts.planning.fit_memory import written_cut
from lora_scripts.planning.memory_plan import MemoryNeeds, MemoryPlan, choose_plan
from lora_scripts.planning.outlined_run import outlined_run
from lora_scripts.preflight.wording import gigabytes
from lora_scripts.processes import ONE, Processes

if TYPE_CHECKING:
    import torch

    from lora_scripts.config import RunConfig
    from lora_scripts.models.source import BaseModel
    from lora_scripts.planning.passes import Passes
    from lora_scripts.training.chosen import Chosen
    from lora_scripts.training.events import Events

__all__ = ["choose_block_swap", "fewest_blocks"]


def choose_block_swap(
    config: RunConfig,
    source: BaseModel,
    device: torch.device,
    dtype: torch.dtype,
    began: Chosen | None,
    events: Events,
    processes: Processes = ONE,
) -> RunConfig:
    """The config with a number in place of auto, and one line on how it came about where blocks are swapped.

    Args:
        began: of the run that is resumed; it goes on as it began.
    Raises:
        LoraScriptsError: the data cannot be used.
    """
    if config.block_swap != "auto":
        return config
    count, reason = processes.from_first(lambda: _chosen(config, source, device, dtype, began, events))
    if reason:
        events.note(f"block_swap: {count} ({reason}).")
    return config.model_copy(update={"block_swap": count})


def fewest_blocks(passes: Passes, needs: MemoryNeeds, choose: Callable[[MemoryNeeds], MemoryPlan]) -> int:
    """The smallest number of swapped blocks with which a plan fits; all where none does.

    Args:
        needs: without any swapped block.
        choose: the best plan for such needs.
    """
    counts = range(passes.num_blocks + 1)
    return next((n for n in counts if choose(needs.beside(-passes.saved_by_swapping(n))).fits), passes.num_blocks)


def _chosen(
    config: RunConfig, source: BaseModel, device: torch.device, dtype: torch.dtype, began: Chosen | None, events: Events
) -> tuple[int, str]:
    """The number, and why; nothing to say of none."""
    if began is not None and began.step_size == config.step_size:
        return began.block_swap, "as this run began" if began.block_swap else ""
    if device.type == "cpu" and config.memory_limit_gb is None:
        return 0, ""  # the memory that blocks would go to is the one they are in
    events.note("block_swap: auto: predicting what the run takes.")
    passes = outlined_run(config, source, device, dtype, lambda what, done, total: None).passes
    budget = memory_budget(device, config.memory_limit_gb, 0)
    micro_batch, checkpointing = written_cut(config, device, began)

    def choose(needs: MemoryNeeds) -> MemoryPlan:
        return choose_plan(needs, budget, config.step_size, micro_batch=micro_batch, checkpointing=checkpointing)

    try:
        count = fewest_blocks(passes, passes.needs, choose)
        plan = choose(passes.needs.beside(-passes.saved_by_swapping(count)))
    except UnpredictableError as error:
        return 0, f"what this model takes cannot be predicted: {error}"
    if not count:
        return 0, ""
    enough = "" if plan.fits else ", which is too little"
    advice = (
        "; quantization would take less time and rounds the weights" if config.task_type == "text-generation" else ""
    )
    return count, (
        f"of {passes.num_blocks} blocks; predicted {gigabytes(plan.num_bytes)} of {gigabytes(budget)} usable{enough}{advice}"
    )
