"""What experience says about a run's settings, each with its reason; never a reason to stop."""

from __future__ import annotations

from lora_scripts.config import RunConfig
from lora_scripts.training.optimizers import optimizer_advice

__all__ = ["advise"]


SMALL = 100_000_000
"""Models with fewer parameters, such as the built-in ones, take larger steps."""


def advise(config: RunConfig, num_examples: int, max_steps: int, uses_per_epoch: int, num_parameters: int) -> list[str]:
    """Lines beginning with `Advice:`, most telling first; `num_parameters` are the frozen model's."""
    lines = list(optimizer_advice(config.optimizer, config.learning_rate, config.lr_scheduler))
    words = config.words
    batch = config.step_size
    passes = max_steps * batch / uses_per_epoch * config.repeats
    if batch > uses_per_epoch:
        lines.append(
            f"batch_size: {config.batch_size} x {config.gradient_accumulation_steps} is above the {uses_per_epoch} {words.examples} "
            "of an epoch, so every step takes them all. A smaller batch takes more, cheaper steps."
        )
    if num_examples < 10:
        lines.append(f"{num_examples} {words.examples} are few: the LoRA will tend to repeat them. {words.enough}.")
    if num_examples and passes > words.many_passes and num_examples * passes > words.many_uses:
        lines.append(
            f"each {words.example} is seen {passes:.0f} times, more than the usual {words.usual_passes}: look at the "
            "earlier checkpoints too."
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
