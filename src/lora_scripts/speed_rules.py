"""What the settings of speed cannot do, said before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig

__all__ = ["graph_obstacles", "speed_faults"]


def graph_obstacles(config: RunConfig) -> list[str]:
    """Settings under which a pass cannot be repeated kernel by kernel, each with the reason."""
    obstacles = []
    if config.train_text_encoder:
        obstacles.append("train_text_encoder: captions become tokens within the pass, on the CPU")
    if config.lora_dropout:
        obstacles.append("lora_dropout: every pass draws its own random numbers")
    if config.gradient_checkpointing is True:
        obstacles.append("gradient_checkpointing: the backward pass asks for the state of the random generator")
    return obstacles


def speed_faults(config: RunConfig) -> list[str]:
    """Messages about settings that exclude one another."""
    if config.cuda_graphs is not True or config.task_type == "text-generation":
        return []
    return [f"cuda_graphs: true: not with {reason}. Remove one of them." for reason in graph_obstacles(config)]
