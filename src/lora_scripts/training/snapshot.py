"""A run's last saved state in memory, to go back to when its numbers fail."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.adapters.lora import Adapter

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """Weights, moments and the loop's numbers after `loop["step"]` steps; about three times the adapter's size.

    It equals the checkpoint of that step, and also exists before the first one.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    loop: dict[str, Any]

    @classmethod
    def take(
        cls, adapter: Adapter, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loop: dict[str, Any]
    ) -> Snapshot:
        """A copy that later steps do not change."""
        weights = {name: value.detach().clone() for name, value in adapter.state_dict().items()}
        return cls(weights, deepcopy(optimizer.state_dict()), scaler.state_dict(), deepcopy(loop))

    def restore(
        self, adapter: Adapter, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> dict[str, Any]:
        """Puts weights and moments back; the loop's numbers of that step."""
        adapter.load_state_dict(self.adapter)
        optimizer.load_state_dict(deepcopy(self.optimizer))
        scaler.load_state_dict(self.scaler)
        return deepcopy(self.loop)
