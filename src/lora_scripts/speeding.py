"""What a run does to be fast, chosen from its settings, its device and its length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.low_bit_choice import low_bit_kind
from lora_scripts.speed_rules import graph_obstacles
from lora_scripts.training.speed import Speed

if TYPE_CHECKING:
    import torch

    from lora_scripts.config import RunConfig
    from lora_scripts.data.training_data import TrainingData
    from lora_scripts.families.protocol import ModelFamily
    from lora_scripts.models.low_bit_layers import LowBitLayers
    from lora_scripts.models.packed_conv import PackedConvolutions
    from lora_scripts.training.compiling import CompiledParts
    from lora_scripts.training.events import Events

__all__ = ["choose_speed", "keep_at_hand"]

COMPILED_SAVES = 0.15
"""Share of a step's time; published gains of compiled blocks lie between a tenth and a third."""
COMPILING_S, SHAPE_S = 60.0, 20.0
"""Seconds of compiling without a cache: in any case, and for every shape of picture. Guesses on the safe side."""
SHARE_FOR_PACKED = 0.25
"""Of the memory that is free on a machine that trains on its CPU, for weights in the order in which its kernels read them."""
LITTLE_MEMORY = 1e8
"""Bytes that are taken without asking how many are free."""
WORTH_RECORDING = 60
"""Steps: the second and third pass of a shape take longer, and a recording saves 3 to 20 % of each one after them."""
SHARE_FOR_DATA = 0.04
"""Of a card's free memory, for encodings: it lies in the 8 % that a memory plan leaves alone."""


def choose_speed(
    config: RunConfig,
    family: ModelFamily,
    data: TrainingData,
    device: torch.device,
    steps: int,
    step_seconds: float | None,
    events: Events,
) -> Speed:
    """What the settings ask for, as far as it can be had; one line for each thing that is switched on or cannot be.

    Args:
        config: with the memory plan in it.
        steps: still to do.
        step_seconds: of one of them, uncompiled; None where it was not measured.
    """
    low_bit = _low_bit(config, family, events)  # first, so that what is compiled is compiled with it
    num_shapes = len({example.shape for example in data.examples}) if family.few_shapes else 1
    compiled = _compiled(config, family, num_shapes, device, steps * (step_seconds or 0.0), events)
    packed = None if compiled else _packed(config, family, device, events)
    graphs = _graphs(config, family, device, events)
    recorded = not (compiled or graphs) and _recorded(config, family, device, steps)
    return Speed(compiled, graphs, low_bit, packed, recorded)


def keep_at_hand(data: TrainingData, device: torch.device) -> TrainingData:
    """The data on the device where it is an accelerator with room for it; else as it is, to be fetched ahead."""
    import torch

    if device.type != "cuda":
        return data
    free, _ = torch.cuda.mem_get_info(device)
    return data.at_home_on(device, round(SHARE_FOR_DATA * free))


def _low_bit(config: RunConfig, family: ModelFamily, events: Events) -> LowBitLayers | None:
    kind = low_bit_kind(config)
    if kind is None:
        return None
    from lora_scripts.models.low_bit_layers import LowBitLayers

    layers = LowBitLayers(family.wide_parts(), kind)
    if not len(layers):
        events.note(f"low_bit_matmul: {kind}: no frozen layer here is large enough to gain by it.", "warning")
        return None
    events.note(f"{len(layers)} frozen layers multiply in {kind} while training.")
    return layers


def _packed(config: RunConfig, family: ModelFamily, device: torch.device, events: Events) -> PackedConvolutions | None:
    if device.type != "cpu":
        return None
    from lora_scripts.models.packed_conv import PackedConvolutions, packed_bytes
    from lora_scripts.planning.budget import available_memory

    modules = family.components.values()
    taken = packed_bytes(modules)
    if taken > LITTLE_MEMORY:
        if config.memory_limit_gb or taken > SHARE_FOR_PACKED * available_memory():
            return None
        events.note(f"Convolutions keep their weights in oneDNN's order too: {taken / 1e9:.1f} GB more, and faster.")
    return PackedConvolutions(modules) if taken else None


def _compiled(
    config: RunConfig,
    family: ModelFamily,
    num_shapes: int,
    device: torch.device,
    seconds_left: float,
    events: Events,
) -> CompiledParts | None:
    if (
        config.compile is False
        or config.block_swap
        or config.shard_model
        or (config.compile == "auto" and device.type != "cuda")
    ):
        return None
    costs = COMPILING_S + SHAPE_S * num_shapes
    if config.compile == "auto" and seconds_left * COMPILED_SAVES < costs:
        return None
    from lora_scripts.training.compiling import CompiledParts, compiler_fault, use_lasting_cache

    parts = family.fusable_parts()
    if not parts:
        events.note("compile: this model has no repeated blocks that are known here; it runs as it is.", "warning")
        return None
    use_lasting_cache()
    if fault := compiler_fault(device):
        events.note(f"compile: nothing can be compiled here ({fault}); the run goes on without.", "warning")
        return None
    events.note(
        f"Compiling {len(parts)} parts of the model: the first step of each of {num_shapes} "
        f"shape{'' if num_shapes == 1 else 's'} takes longer, less so when the same was compiled here before."
    )
    return CompiledParts(parts, few_shapes=family.few_shapes)


def _recorded(config: RunConfig, family: ModelFamily, device: torch.device, steps: int) -> bool:
    possible = device.type == "cpu" and family.few_shapes and not graph_obstacles(config)
    return config.record_passes and possible and steps >= WORTH_RECORDING


def _graphs(config: RunConfig, family: ModelFamily, device: torch.device, events: Events) -> bool:
    if config.cuda_graphs is False or not family.few_shapes:
        return False
    if config.cuda_graphs == "auto" and device.type != "cuda":
        return False
    if obstacles := graph_obstacles(config):  # checkpointing may have been chosen by the memory plan
        if config.cuda_graphs is True:
            events.note(f"cuda_graphs: not with {obstacles[0]}.", "warning")
        return False
    if device.type == "cuda":
        events.note("Passes are recorded as CUDA graphs, one for each shape.")
    return True
