"""How many steps a run has, known from the number of pictures before any is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_scripts.config import RunConfig
from lora_scripts.data.dataset import Example
from lora_scripts.data.sampler import total_uses
from lora_scripts.data.split import num_held_out
from lora_scripts.training.checkpoint import list_checkpoints

__all__ = ["RunLength", "run_length", "steps_done"]


@dataclass(frozen=True)
class RunLength:
    """Steps of a run.

    Attributes:
        done: steps that the newest checkpoint in the output folder holds.
    """

    steps_per_epoch: int
    max_steps: int
    done: int = 0

    @property
    def to_do(self) -> int:
        return max(0, self.max_steps - self.done)


def run_length(config: RunConfig, examples: Sequence[Example]) -> RunLength:
    """As the run will count them: pictures held out for validation are taken off at the average of their repeats, and
    regularization takes as many uses again.

    Raises:
        DataError: more pictures would be held out than half.
    """
    learnt = [example for example in examples if not example.is_regularization]
    held_out = num_held_out(config.validation_pictures, len(learnt))
    trained = round(total_uses(learnt) * (1 - held_out / max(1, len(learnt))))
    trained *= 2 if len(learnt) < len(examples) else 1
    # Left-overs of the shapes are put together into mixed steps, so an epoch is as short as it can be.
    per_epoch = max(1, -(-trained // config.step_size))
    return RunLength(per_epoch, config.max_steps or (config.epochs or 10) * per_epoch, steps_done(config.output_dir))


def steps_done(output_dir: Path) -> int:
    """Steps that the newest checkpoint in an output folder holds."""
    found = list_checkpoints(output_dir)
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0
