"""How a run judges itself while it goes on: when the validation loss is measured, and when it has nothing more to gain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.training.checkpoint import saved_steps
from lora_scripts.training.ranking import Judge
from lora_scripts.training.validation import Validator, plan_validation

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.data.sampler import StepPlan
    from lora_scripts.data.split import Split
    from lora_scripts.families.protocol import ModelFamily
    from lora_scripts.training.events import Events
    from lora_scripts.training.loop import LoopState

__all__ = ["make_judge"]


def make_judge(
    config: RunConfig,
    family: ModelFamily,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    parts: Split,
    plan: StepPlan,
    max_steps: int,
    state: LoopState,
    device: torch.device,
    events: Events,
) -> tuple[Judge | None, int]:
    """What measures the validation loss, and every how many steps; None and 0 when nothing is measured."""
    if parts.held_out is None:
        return None, 0
    number = len(parts.held_out.dataset.examples)
    step_size = plan.uses_per_epoch / plan.steps_per_epoch
    when = plan_validation(config.validate_every, number, max_steps, step_size, config.save_steps)
    if not when.every:
        if config.validate_every == "auto":
            events.note(
                "The run is too short for a validation loss at 3 % of its time; validate_every measures anyway."
            )
        return None, 0
    events.note(
        f"Validation loss every {when.every} steps at {when.num_pairs} noise levels per picture: about {when.share:.1%} of the run."
    )
    validator = Validator(family, adapter, optimizer, parts, when, config.micro_batch, device)

    def saved(step: int) -> set[int]:
        now = {step} if step % config.save_steps == 0 or step == max_steps else set()
        return now | saved_steps(config.output_dir)

    return Judge(validator.measure, state, config.early_stopping, saved, events), when.every
