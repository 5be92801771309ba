"""LoRA+: lora_B learns at a multiple of lora_A's rate.

Source: Hayou et al. 2024, arXiv 2402.12354, section 4; what is no lora_A counts as lora_B, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_scripts.adapters.blocks import block_of
from lora_scripts.training.optimizers import ParameterGroup

if TYPE_CHECKING:
    from torch import nn

    from lora_scripts.adapters.lora import Adapter

__all__ = ["parameter_groups"]


def parameter_groups(adapter: Adapter, rate: Callable[[str], float], ratio: float = 1.0) -> list[ParameterGroup]:
    """One group for each component, and for each of the adapter's `block_rates`, `unet.mid`.

    With another ratio than 1 a second one of each, `unet_lora_B`, at `ratio` times its rate.

    Args:
        rate: component to its learning rate.
    """
    parameters: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for layer, trained in adapter.layers.items():
        group = block_of(layer, adapter.block_rates) or layer.partition(".")[0]
        for matrix, parameter in trained.trained().items():
            parameters.setdefault((group, ratio != 1.0 and matrix != "lora_A"), []).append(parameter)
    rates = {group: adapter.block_rates.get(group) or rate(group) for group, _ in parameters}
    return [
        ParameterGroup(f"{group}_lora_B" if fast else group, members, rates[group] * (ratio if fast else 1.0))
        for (group, fast), members in parameters.items()
    ]
