"""How a run judges itself while it goes on: when the validation loss is measured, and when it has nothing more to gain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.training.checkpoint import saved_steps
from lora_scripts.training.ranking import Judge
from lora_scripts.training.validation import Validator, plan_validation

if TYPE_CHECKING:
    from lora_scripts.processes import Processes
    from lora_scripts.tasks.protocol import Run
    from lora_scripts.training.loop import LoopState

__all__ = ["make_judge"]


def make_judge(run: Run, state: LoopState, processes: Processes) -> tuple[Judge | None, int]:
    """What measures the validation loss, and every how many steps; None and 0 when nothing is measured."""
    config, parts, plan, events = run.config, run.prepared.parts, run.plan, run.events
    if parts.held_out is None:
        return None, 0
    when = plan_validation(
        config.validate_every,
        len(parts.held_out.examples),
        run.max_steps,
        plan.uses_per_epoch / plan.steps_per_epoch,
        config.save_steps,
        run.family.num_levels,
    )
    if not when.every:
        if config.validate_every == "auto":
            events.note(
                "The run is too short for a validation loss at 3 % of its time; validate_every measures anyway."
            )
        return None, 0
    levels = f" at {when.num_pairs} noise levels per {config.words.example}" if run.family.num_levels > 1 else ""
    events.note(f"Validation loss every {when.every} steps{levels}: about {when.share:.1%} of the run.")
    validator = Validator(
        run.family, run.adapter, run.optimizer, parts, when, config.micro_batch, run.device, processes
    )

    def saved(step: int) -> set[int]:
        now = {step} if step % config.save_steps == 0 or step == run.max_steps else set()
        return now | saved_steps(config.output_dir)

    return Judge(validator.measure, state, config.early_stopping, saved, events), when.every
