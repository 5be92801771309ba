"""What the settings of speed cannot do, said before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig

__all__ = [
    "can_shard",
    "can_swap",
    "graph_obstacles",
    "low_bit_obstacles",
    "require_processes",
    "speed_faults",
    "swapped_blocks",
]


def swapped_blocks(config: RunConfig) -> int:
    """Blocks of the model that are swapped; of auto none, until it is chosen."""
    return 0 if config.block_swap == "auto" else config.block_swap


def graph_obstacles(config: RunConfig) -> list[str]:
    """Settings under which a pass cannot be repeated kernel by kernel, each with the reason."""
    obstacles = []
    if config.lora_dropout:
        obstacles.append("lora_dropout: every pass draws its own random numbers")
    if swapped_blocks(config):
        obstacles.append("block_swap: what is fetched when is decided as the pass goes")
    if config.gradient_checkpointing is True:
        obstacles.append("gradient_checkpointing: the backward pass asks for the state of the random generator")
    return obstacles


def low_bit_obstacles(config: RunConfig) -> list[str]:
    """Settings under which frozen layers cannot multiply in 8 bits, each with the reason."""
    obstacles = []
    if config.quantization != "none":
        obstacles.append(f"quantization: {config.quantization}, whose packed weights are unpacked for every product")
    if config.block_swap:
        obstacles.append("block_swap: the weights in 8 bits would stay on the device when the blocks leave it")
    if config.shard_model:
        obstacles.append("shard_model: the weights in 8 bits would be whole in every process")
    if config.objective == "dpo":
        obstacles.append("objective: dpo, whose reference is measured with plain products")
    return obstacles


def speed_faults(config: RunConfig) -> list[str]:
    """Messages about settings that exclude one another."""
    faults = []
    if config.cuda_graphs is True and config.task_type != "text-generation":
        faults += [f"cuda_graphs: true: not with {reason}. Remove one of them." for reason in graph_obstacles(config)]
    if config.low_bit_matmul not in ("none", "auto"):
        kind = config.low_bit_matmul
        faults += [
            f"low_bit_matmul: {kind}: not with {reason}. Remove one of them." for reason in low_bit_obstacles(config)
        ]
    if config.block_swap:
        faults += [
            f"block_swap: {config.block_swap}: not with {reason}. Remove one of them."
            for reason in _swap_obstacles(config)
        ]
    if config.shard_model:
        faults += [f"shard_model: not with {reason}. Remove one of them." for reason in _shard_obstacles(config)]
    return faults


def require_processes(config: RunConfig, count: int) -> None:
    """Raises ConfigError when the model is to be cut over the processes of a run that has only one."""
    if config.shard_model and count == 1:
        raise ConfigError(
            "shard_model: true: this run has one process, so there is nobody to share the weights with. Start it with "
            "torchrun --nproc-per-node N (docs/several-gpus.md), plan it with --processes N, or set shard_model: false."
        )


def can_shard(config: RunConfig) -> bool:
    """Whether this run's model can be cut over processes."""
    return config.task_type == "text-generation" and not _shard_obstacles(config)


def can_swap(config: RunConfig) -> bool:
    """Whether blocks of this run's model can be swapped."""
    return not _swap_obstacles(config)


def _shard_obstacles(config: RunConfig) -> list[str]:
    obstacles = _obstacles_of_absent_weights(config)
    if config.block_swap:
        obstacles.append("block_swap, which keeps whole blocks elsewhere")
    if config.batch_size == "auto":
        obstacles.append("batch_size: auto, because all processes make the same passes: write a number")
    return obstacles


def _swap_obstacles(config: RunConfig) -> list[str]:
    return _obstacles_of_absent_weights(config)


def _obstacles_of_absent_weights(config: RunConfig) -> list[str]:
    """What needs frozen weights as they are, when they are on the device only while a block computes."""
    obstacles = []
    if config.adapter in ("dora", "oft") or config.lora_init == "pissa":
        kind = f"adapter: {config.adapter}" if config.adapter in ("dora", "oft") else "lora_init: pissa"
        obstacles.append(f"{kind}, whose files are made from the frozen weights, which are not on the device then")
    if config.base_loras:
        obstacles.append("base_loras, which are folded into the frozen weights")
    if config.quantization != "none":
        obstacles.append(f"quantization: {config.quantization}, whose packed weights are not moved yet")
    if config.compile is True:
        obstacles.append("compile: true, which would compile the fetching too")
    return obstacles
