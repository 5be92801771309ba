"""What experience says about a run's settings, each with its reason; never a reason to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.training.optimizers import optimizer_advice

if TYPE_CHECKING:
    from lora_scripts.data.dataset import Dataset

__all__ = ["advise"]


SMALL = 100_000_000
"""Models with fewer parameters, such as the built-in ones, take larger steps."""


def advise(config: RunConfig, dataset: Dataset, max_steps: int, uses_per_epoch: int, num_parameters: int) -> list[str]:
    """Lines beginning with `Advice:`, most telling first; `num_parameters` are the frozen model's."""
    lines = list(optimizer_advice(config.optimizer, config.learning_rate, config.lr_scheduler))
    pictures = len(dataset.examples)
    batch = config.step_size
    passes = max_steps * batch / uses_per_epoch * config.repeats
    if batch > uses_per_epoch:
        lines.append(
            f"batch_size: {config.batch_size} x {config.gradient_accumulation_steps} is above the {uses_per_epoch} pictures "
            "of an epoch, so every step takes them all. A smaller batch takes more, cheaper steps."
        )
    if pictures < 10:
        lines.append(f"{pictures} pictures are few: the LoRA will tend to repeat them. 50 to 200 give a free hand.")
    if pictures and passes > 60 and pictures * passes > 3000:
        lines.append(
            f"each picture is seen {passes:.0f} times, more than the usual 10 to 30: look at the earlier checkpoints too."
        )
    if (
        not lines
        and config.optimizer in ("adamw", "adamw8bit")
        and config.learning_rate > 5e-4
        and num_parameters > SMALL
    ):
        lines.append(f"learning_rate: {config.learning_rate:g} is high; 1e-4 to 3e-4 suits most sets.")
    if config.lora_rank > 64:
        lines.append(
            f"lora_rank: {config.lora_rank} makes a large file and learns single pictures by heart; 8 to 32 is usual."
        )
    return [f"Advice: {line}" for line in lines]
