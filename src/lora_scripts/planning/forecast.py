"""What a run will take, from its config alone: no weight is read and nothing is computed.

The model is built with fake tensors, so that the predictors of a run (`planning.passes`, `planning.memory_plan`) can be asked
the same questions before there is a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from lora_scripts.base_loras import find_base_loras, named
from lora_scripts.config import RunConfig
from lora_scripts.data.sampler import StepPlan, mean_uses
from lora_scripts.devices import choose_device, choose_dtype
from lora_scripts.errors import ModelError
from lora_scripts.low_bit_choice import choose_low_bit
from lora_scripts.models.source import resolve_base_model
from lora_scripts.planning.activations import UnpredictableError
from lora_scripts.planning.budget import USABLE, memory_budget
from lora_scripts.planning.changes import Change, changes_that_save
from lora_scripts.planning.choose_swap import fewest_blocks
from lora_scripts.planning.fit_memory import written_cut
from lora_scripts.planning.memory_plan import MemoryPlan, choose_plan
from lora_scripts.planning.memory_terms import Term, memory_terms
from lora_scripts.planning.outlined_run import outlined_run
from lora_scripts.preflight.disk import DiskNeed, output_need
from lora_scripts.preflight.run_length import RunLength, steps_done
from lora_scripts.processes import Processes, spread_over
from lora_scripts.speed_rules import require_processes, swapped_blocks
from lora_scripts.training.chosen import Chosen
from lora_scripts.training.events import Events
from lora_scripts.training.matmul_rate import matmul_rate
from lora_scripts.training.validation import LARGEST_SHARE

if TYPE_CHECKING:
    from lora_scripts.models.source import BaseModel
    from lora_scripts.tasks.protocol import Progress

__all__ = ["Forecast", "Work", "make_forecast"]

CUDA_BYTES = 500_000_000
"""A guess of what CUDA takes for itself in every process: kernels, handles, buffers; 0.3 to 0.6 GB by card and driver."""


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Attributes:
        steps: optimizer steps still to do.
        examples: uses of them, by their number.
        cost: tokens or pixels of these uses.
        unit: which of both, in the plural.
        flops: floating-point operations, measurements of the validation loss included.
        flops_per_s: of this machine in plain matrix products, in all processes together; None where it was not measured.
    """

    steps: int
    examples: int
    cost: int
    unit: str
    flops: float
    flops_per_s: float | None

    @property
    def seconds(self) -> float | None:
        """At the speed of plain matrix products: a run takes this long at least."""
        return None if self.flops_per_s is None else self.flops / self.flops_per_s


@dataclass(frozen=True)
class Forecast:
    """The answer of `lora-scripts plan`.

    Attributes:
        facts: (what, value) pairs about the model and the data.
        plan: how a step is cut, what it takes at its peak and what may be used.
        terms: `plan.num_bytes` by what it is for.
        changes: what makes it fit, cheapest first; empty where it fits. The last one alone may make it fit.
        device_bytes: what `--memory-gb` said; None for this machine.
        block_swap: blocks that are swapped, as written or as chosen for auto.
    """

    facts: Sequence[tuple[str, str]]
    plan: MemoryPlan
    terms: Sequence[Term]
    changes: Sequence[Change]
    work: Work
    disk: DiskNeed
    device_bytes: int | None = None
    block_swap: int = 0

    @property
    def fits(self) -> bool:
        return self.plan.fits


def make_forecast(config: RunConfig, memory_gb: float | None, progress: Progress, num_processes: int = 1) -> Forecast:
    """Memory, work and disk of a run.

    Args:
        memory_gb: memory of another machine's graphics card, in 10^9 bytes; None for this machine.
        progress: told (what, done, total) while dialogues are tokenised.
        num_processes: that the run will be started on; the forecast is for one of them.
    Raises:
        LoraScriptsError: the model or the data cannot be used, or the model cannot be run with fake tensors.
    """
    require_processes(config, num_processes)
    config = choose_low_bit(config, Events()) if memory_gb is None else config
    beneath = find_base_loras(config)
    source = resolve_base_model(config.base_model, allow_download=config.allow_download, task=config.task_type)
    device = choose_device(config.device)
    began = Chosen.read(config.output_dir)
    config = spread_over(config, Processes(count=num_processes), began)
    dtype = choose_dtype(config, device, source, began) if memory_gb is None else _dtype_of_a_card(config, source)
    outlined = outlined_run(config, source, device, dtype, progress, num_processes)
    adapter, data, passes = outlined.adapter, outlined.data, outlined.passes

    # Memory.
    card = torch.device("cuda") if memory_gb is not None else device
    held = 0 if memory_gb is None else CUDA_BYTES
    budget = memory_budget(device, config.memory_limit_gb, 0) if memory_gb is None else round(USABLE * memory_gb * 1e9)
    micro_batch, checkpointing = written_cut(config, card, began)
    try:
        choose = partial(
            choose_plan,
            budget_bytes=budget,
            effective_batch=config.step_size,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
        )
        if config.block_swap == "auto":
            count = fewest_blocks(passes, passes.needs.beside(held), choose)
            config = config.model_copy(update={"block_swap": count})
            passes = passes.with_config(config)
        needs = passes.needs.beside(held - passes.saved_by(config.quantization))
        plan = choose(needs)
        terms = memory_terms(passes, adapter, needs, plan, config, held)
        changes = [] if plan.fits else changes_that_save(config, card, plan, needs, passes, data)
        trace = passes.trace(plan.micro_batch, plan.checkpointing)
    except UnpredictableError as error:
        raise ModelError(
            f"base_model {config.base_model}: what it takes cannot be predicted ({error}). A run finds out as it goes."
        ) from None

    # Work and disk.
    steps = StepPlan.of(data.train.examples, config.step_size, config.seed)
    length = RunLength(
        steps.steps_per_epoch,
        config.max_steps or (config.epochs or 10) * steps.steps_per_epoch,
        steps_done(config.output_dir),
    )
    examples = data.train.examples
    each_epoch = sum(each.cost * times for each, times in zip(examples, mean_uses(examples), strict=True))
    cost = round(each_epoch / steps.steps_per_epoch * length.to_do)
    more = 1 + (LARGEST_SHARE if data.is_measured and config.validate_every != 0 else 0)
    work = Work(
        length.to_do,
        round(steps.uses_per_epoch / steps.steps_per_epoch * length.to_do),
        cost,
        data.unit,
        more * cost * trace.flops / passes.cost(plan.micro_batch),
        num_processes * matmul_rate(device, dtype) if memory_gb is None else None,
    )
    disk = output_need(config, length, adapter.num_parameters, len(data.train.examples), data.previews, data.resolution)
    kind = str(dtype).removeprefix("torch.")
    facts = [("base model", f"{source.title} ({source.family}), {kind}"), *data.facts]
    if swapped_blocks(config):
        facts.append(("block_swap", f"{config.block_swap} of {passes.num_blocks} blocks"))
    if beneath:
        facts.insert(1, ("base LoRAs", f"{named(beneath)}, folded into it"))
    device_bytes = None if memory_gb is None else round(memory_gb * 1e9)
    return Forecast(facts, plan, terms, changes, work, disk, device_bytes, swapped_blocks(config))


def _dtype_of_a_card(config: RunConfig, source: BaseModel) -> torch.dtype:
    """As `choose_dtype` would choose on a graphics card of the last years."""
    if config.mixed_precision == "auto":
        return torch.bfloat16
    return choose_dtype(config, torch.device("cuda"), source)
