"""The moving average of the trained weights over the last steps: what a run shows, measures and writes where it is on.

It is kept in the optimizer's state, one float32 tensor beside the moments of each weight, and so goes wherever these go, to
the bit: into checkpoints, into snapshots to go back to, and into every process. Training itself goes on with the weights as
they are. Factors multiply in most kinds of adapter, so the average of the factors is not the factors' average change; for
steps as near to each other as those within the average's reach the difference is of second order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["averages", "decay_at", "update_average"]

KEY = "average"
"""Of the tensor in the optimizer's state of a weight."""


def decay_at(step: int, decay: float) -> float:
    """What is kept of the average after `step` optimizer steps: (1 + n) / (10 + n) for n steps before, at most `decay`.

    So the first step begins the average, and it reaches back over a ninth of a run until `decay` is reached: 0.999 after
    some 9,000 steps.

    Source: diffusers' `EMAModel`, without its option `use_ema_warmup`.
    """
    before = step - 1
    return 0.0 if before <= 0 else min((1 + before) / (10 + before), decay)


@torch.no_grad()
def update_average(optimizer: Optimizer, step: int, decay: float) -> None:
    """Takes the weights into their average, after the optimizer step number `step` (from 1) was taken."""
    held: list[Tensor] = []
    weights: list[Tensor] = []
    for parameter in _parameters(optimizer):
        state = optimizer.state.get(parameter)
        if not state:
            continue  # has never had a gradient, so it is its own average; optimizers take an entry for one they have begun
        if KEY in state:
            held.append(state[KEY])
            weights.append(parameter)
        else:
            state[KEY] = parameter.detach().clone()
    if held:
        torch._foreach_lerp_(held, weights, 1.0 - decay_at(step, decay))


def averages(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """The weights that have an average, with it; empty where none is kept."""
    found = {parameter: optimizer.state.get(parameter, {}).get(KEY) for parameter in _parameters(optimizer)}
    return {parameter: average for parameter, average in found.items() if average is not None}


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
