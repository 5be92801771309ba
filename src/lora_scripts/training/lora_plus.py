"""LoRA+: lora_B learns at a multiple of lora_A's rate.

Source: Hayou et al. 2024, arXiv 2402.12354, section 4; what is no lora_A counts as lora_B, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_scripts.training.optimizers import ParameterGroup

if TYPE_CHECKING:
    from torch import nn

    from lora_scripts.adapters.lora import Adapter

__all__ = ["parameter_groups"]


def parameter_groups(adapter: Adapter, rate: Callable[[str], float], ratio: float = 1.0) -> list[ParameterGroup]:
    """One group for each component; with another ratio than 1 a second one, `unet_lora_B`, at `ratio` times its rate.

    Args:
        rate: component to its learning rate.
    """
    parameters: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        component, matrix = name.partition(".")[0], name.rpartition(".")[2]
        parameters.setdefault((component, ratio != 1.0 and matrix != "lora_A"), []).append(parameter)
    return [
        ParameterGroup(
            f"{component}_lora_B" if fast else component, members, rate(component) * (ratio if fast else 1.0)
        )
        for (component, fast), members in parameters.items()
    ]
