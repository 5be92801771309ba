"""What would make a run fit that does not: changes of the config, the cheapest first, each with what it saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_scripts.planning.memory_plan import (
    OPTIMIZER_BYTES,
    SCRATCH,
    MemoryNeeds,
    MemoryPlan,
    micro_batch_sizes,
    optimizer_bytes,
)
from lora_scripts.planning.quantised_bytes import QUANTIZATIONS
from lora_scripts.speed_rules import can_shard, can_swap, swapped_blocks

if TYPE_CHECKING:
    import torch

    from lora_scripts.config import RunConfig
    from lora_scripts.planning.passes import Passes
    from lora_scripts.tasks.protocol import DataOutline

__all__ = ["Change", "changes_that_save"]

SMALL_OPTIMIZER = "adamw8bit"


@dataclass(frozen=True)
class Change:
    """One change, on top of those before it.

    Attributes:
        setting: as it stands in the YAML.
        price: what it costs beside memory.
        num_bytes: the peak of a step after it.
        saves: less than before it.
        fits: whether the run fits then.
    """

    setting: str
    price: str
    num_bytes: int
    saves: int
    fits: bool


def changes_that_save(
    config: RunConfig,
    device: torch.device,
    plan: MemoryPlan,
    needs: MemoryNeeds,
    passes: Passes,
    data: DataOutline,
) -> list[Change]:
    """Changes until the run fits, or all there are.

    Args:
        device: that will train; the 8-bit optimizer needs CUDA.
        plan: one that does not fit.
    """
    found: list[Change] = []
    before = plan.num_bytes
    for setting, price, num_bytes in _steps(config, device, plan, needs, passes, data):
        if num_bytes < before:
            found.append(Change(setting, price, num_bytes, before - num_bytes, num_bytes <= plan.budget_bytes))
            before = num_bytes
        if before <= plan.budget_bytes:
            break
    return found


def _steps(
    config: RunConfig,
    device: torch.device,
    plan: MemoryPlan,
    needs: MemoryNeeds,
    passes: Passes,
    data: DataOutline,
) -> Iterator[tuple[str, str, int]]:
    """(setting, price, bytes) in the order of what they cost."""
    step_size = plan.micro_batch * plan.accumulation
    size, checkpointing = plan.micro_batch, plan.checkpointing

    def total() -> int:
        return needs.total(size, checkpointing, step_size // size)

    smaller = [other for other in micro_batch_sizes(step_size) if other < size]
    if smaller:
        fitting = (s for s in smaller if needs.total(s, checkpointing, step_size // s) <= plan.budget_bytes)
        size = next(fitting, smaller[-1])
        yield f"batch_size: {size}, gradient_accumulation_steps: {step_size // size}", "the result is the same", total()
    if not checkpointing:
        checkpointing = True
        yield "gradient_checkpointing: true", "a third more time, the result is the same", total()
    if device.type == "cuda" and OPTIMIZER_BYTES[config.optimizer] > OPTIMIZER_BYTES[SMALL_OPTIMIZER]:
        small = optimizer_bytes(config.model_copy(update={"optimizer": SMALL_OPTIMIZER}))
        needs = replace(needs, optimizer=needs.optimizer * small // optimizer_bytes(config))
        yield f"optimizer: {SMALL_OPTIMIZER}", "moments are rounded", total()
    if passes.num_processes > 1 and not config.shard_model and can_shard(config):
        needs, config = needs.beside(-passes.saved_by_sharding()), config.model_copy(update={"shard_model": True})
        yield "shard_model: true", "layers are gathered in every pass, the result is the same", total()
    held = QUANTIZATIONS.index(config.quantization)
    stronger = (
        QUANTIZATIONS[held + 1 :]
        if config.task_type == "text-generation" and config.lora_init != "pissa" and not config.shard_model
        else ()
    )
    for kind in stronger:
        more = passes.saved_by(kind) - passes.saved_by(QUANTIZATIONS[held])
        needs, held = needs.beside(-more), QUANTIZATIONS.index(kind)
        yield f"quantization: {kind}", "weights are rounded", total()
    swapped = swapped_blocks(config)
    alone = config.quantization == "none" and held == 0 and not config.shard_model
    if swapped < passes.num_blocks and alone and can_swap(config):
        here, most = passes.saved_by_swapping(swapped), passes.num_blocks
        counts = range(swapped + 1, most + 1)
        fitting = (n for n in counts if total() - (passes.saved_by_swapping(n) - here) <= plan.budget_bytes)
        count = next(fitting, None)
        if count is not None:
            needs = needs.beside(here - passes.saved_by_swapping(count))
            yield f"block_swap: {count}", "weights are fetched in every pass, the result is the same", total()
    for setting, data_then in data.smaller():
        other = passes.with_data(data_then)
        pass_bytes = other.trace(size, checkpointing).peak_bytes
        needs = replace(needs, of_pass=lambda *_, taken=pass_bytes: taken, factor=SCRATCH)
        yield setting, "less is seen of each example", total()
