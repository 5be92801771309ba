"""The numbers that `batch_size: auto` and `gradient_checkpointing: auto` stand for in a run.

Only how a step is cut into passes is chosen. Its pictures, their order and their random numbers follow from the number of
pictures per step, which is the user's: a run with auto is the run with the chosen numbers written out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.planning.activations import UnpredictableError
from lora_scripts.planning.budget import memory_budget
from lora_scripts.planning.memory_plan import MemoryNeeds, MemoryPlan, choose_plan, describe_split
from lora_scripts.planning.passes import Passes
from lora_scripts.planning.settle import settle
from lora_scripts.planning.trial_pass import can_measure

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.data.training_data import TrainingData
    from lora_scripts.families.protocol import ModelFamily
    from lora_scripts.training.chosen import Chosen

__all__ = ["FittedRun", "fit_memory", "written_cut"]


@dataclass(frozen=True)
class FittedRun:
    """A config without auto.

    Attributes:
        config: how a step is cut stands in it as if the user had written it.
        summary: one line that says what was chosen and why; empty when there was nothing to choose.
        fits: false when no way of cutting a step is predicted to fit.
    """

    config: RunConfig
    summary: str = ""
    fits: bool = True


def fit_memory(
    config: RunConfig,
    family: ModelFamily,
    adapter: Adapter,
    data: TrainingData,
    device: torch.device,
    began: Chosen | None = None,
    planned: FittedRun | None = None,
) -> FittedRun:
    """Chooses what is auto and sets the model's checkpointing; weights, gradients and random state stay as they are.

    Memory is predicted with fake tensors for the largest shape; on CUDA the chosen pass is then run once and measured.

    Args:
        adapter: attached to the family.
        began: of the run that is resumed; it goes on as it began.
        planned: what the check before the run has chosen already.
    """
    if planned is None:
        fitted = _fit(config, family, adapter, data, device, began)
    else:  # of its config only the cut: the check knows nothing of further processes
        cut = planned.config
        written = _written_out(config, cut.micro_batch, cut.gradient_checkpointing is True)
        fitted = replace(planned, config=written)
    family.set_checkpointing(fitted.config.gradient_checkpointing is True)
    return fitted


def _fit(
    config: RunConfig,
    family: ModelFamily,
    adapter: Adapter,
    data: TrainingData,
    device: torch.device,
    began: Chosen | None,
) -> FittedRun:
    micro_batch, checkpointing = written_cut(config, device, began)
    if micro_batch is not None and checkpointing is not None:
        goes_on = began is not None and began.step_size == config.step_size
        fitted = _written_out(config, micro_batch, checkpointing)
        chosen = config.batch_size == "auto" or (checkpointing and config.gradient_checkpointing == "auto")
        return FittedRun(fitted, f"as this run began; {_split(fitted)}" if goes_on and chosen else "")

    passes = Passes(config, family, adapter, data, device)
    needs = passes.needs
    budget = memory_budget(device, config.memory_limit_gb, needs.weights)

    def choose(needs: MemoryNeeds) -> MemoryPlan:
        return choose_plan(needs, budget, config.step_size, micro_batch=micro_batch, checkpointing=checkpointing)

    try:
        plan = settle(needs, choose, passes.measure) if can_measure(device) else choose(needs)
    except UnpredictableError as error:
        # The prediction is a help, not a condition: when memory is short after all, the passes are halved on the way.
        fitted = _written_out(config, micro_batch or config.step_size, bool(checkpointing))
        return FittedRun(fitted, f"cannot be predicted for this model ({error}); {_split(fitted)}")
    return FittedRun(_written_out(config, plan.micro_batch, plan.checkpointing), str(plan), plan.fits)


def written_cut(config: RunConfig, device: torch.device, began: Chosen | None = None) -> tuple[int | None, bool | None]:
    """The micro-batch and whether to checkpoint, where config or `began` say so; None for what is to be chosen."""
    micro_batch = None if config.batch_size == "auto" else config.batch_size
    checkpointing = None if config.gradient_checkpointing == "auto" else config.gradient_checkpointing
    if began is not None and began.step_size == config.step_size:
        micro_batch = began.batch_size if micro_batch is None else micro_batch
        checkpointing = began.gradient_checkpointing if checkpointing is None else checkpointing
    # Without a limit a CPU's memory is seldom short, and the prediction would take longer than a step of a small model.
    elif micro_batch is not None and device.type == "cpu" and config.memory_limit_gb is None:
        checkpointing = bool(checkpointing)
    if checkpointing is None and config.shard_model:
        checkpointing = (
            True  # a pass takes all processes, so none can try one; and memory is short, else nothing were cut
        )
    return micro_batch, checkpointing


def _written_out(config: RunConfig, micro_batch: int, checkpointing: bool) -> RunConfig:
    """The config with numbers in place of auto."""
    values: dict[str, object] = {"gradient_checkpointing": checkpointing}
    if config.batch_size == "auto":
        values |= {"batch_size": micro_batch, "gradient_accumulation_steps": config.step_size // micro_batch}
    return config.model_copy(update=values)


def _split(config: RunConfig) -> str:
    return describe_split(config.micro_batch, config.gradient_accumulation_steps, config.gradient_checkpointing is True)
