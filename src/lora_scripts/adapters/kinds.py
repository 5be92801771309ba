"""What an adapter is to be like: its kind, and the rank and scale of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

from lora_scripts.adapters.blocks import block_of
from lora_scripts.adapters.dora import DoRAConv2d, DoRALinear
from lora_scripts.adapters.layer import AdapterLayer, weight_shape
from lora_scripts.adapters.layers import LoRAConv2d, LoRAInit, LoRALinear
from lora_scripts.adapters.loha import LoHaLayer
from lora_scripts.adapters.lokr import LoKrLayer
from lora_scripts.adapters.oft import OFTLayer
from lora_scripts.adapters.pissa import PiSSAConv2d, PiSSALinear
from lora_scripts.adapters.rslora import rslora_alpha
from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LOW_RANK", "AdapterForm", "AdapterKind", "is_convolution"]

AdapterKind = Literal["lora", "locon", "dora", "loha", "lokr", "oft"]
LOW_RANK = frozenset({"lora", "locon", "dora"})
"""Kinds with lora_A and lora_B."""

_LAYERS: dict[tuple[AdapterKind, bool], tuple[Callable[..., AdapterLayer], Callable[..., AdapterLayer]]] = {
    ("lora", False): (LoRALinear, LoRAConv2d),
    ("lora", True): (PiSSALinear, PiSSAConv2d),
    ("locon", False): (LoRALinear, LoRAConv2d),
    ("locon", True): (PiSSALinear, PiSSAConv2d),
    ("dora", False): (DoRALinear, DoRAConv2d),
    ("loha", False): (LoHaLayer, LoHaLayer),
    ("lokr", False): (LoKrLayer, LoKrLayer),
    ("oft", False): (OFTLayer, OFTLayer),
}
"""Kind of adapter and whether it starts by PiSSA, to what makes its linear layers and convolutions."""


@dataclass(frozen=True)
class AdapterForm:
    """The settings of the trainable layers.

    Attributes:
        rank: R; of an OFT the largest size of its blocks.
        alpha: the scale is alpha / rank; a layer of another rank gets the alpha that makes its scale the same.
        dropout: share of the change's inputs that is zeroed in training.
        init: how low-rank kinds begin, see `LoRALayer.reset`; "pissa": see `adapters.pissa`.
        use_rslora: the scale is alpha / sqrt(rank), see `adapters.rslora`.
        conv_rank, conv_alpha: of convolutions with a kernel above 1 x 1; None: as the other layers.
        lokr_factor: see `adapters.lokr.factorised`.
        block_ranks: ranks by block, see `adapters.blocks`; 0 leaves its layers out.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    init: LoRAInit = "gaussian"
    kind: AdapterKind = "lora"
    use_rslora: bool = False
    conv_rank: int | None = None
    conv_alpha: float | None = None
    lokr_factor: int | None = None
    block_ranks: Mapping[str, int] = field(default_factory=dict)

    def rank_of(self, name: str, base: nn.Linear | nn.Conv2d) -> int:
        """The rank of a layer, `unet.[...].to_q`; 0 where it is left out."""
        rank = self.conv_rank if self.conv_rank is not None and is_convolution(base) else self.rank
        block = block_of(name, self.block_ranks)
        if block is None:
            return rank
        # conv_rank stays the most that a convolution gets.
        own = self.block_ranks[block]
        return own if rank == self.rank else min(rank, own)

    def make(self, name: str, base: nn.Linear | nn.Conv2d) -> AdapterLayer:
        """The trainable layer for a frozen one; its initial values are still to be drawn."""
        rank, alpha = self.rank_of(name, base), self.alpha
        if self.conv_alpha is not None and self.conv_rank is not None and is_convolution(base):
            alpha, full_rank = self.conv_alpha, self.conv_rank
        else:
            full_rank = self.rank
        alpha = rslora_alpha(alpha, rank) if self.use_rslora else alpha * rank / full_rank
        make = _LAYERS[self.kind, self.init == "pissa"][isinstance(base, nn.Conv2d)]
        options = {"factor": self.lokr_factor} if self.kind == "lokr" else {}
        return make(base, rank, alpha, self.dropout, **options)

    def check(self, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> None:
        """Does nothing when every layer can have the rank that it gets.

        Raises:
            ConfigError: a rank is too large or none; kind and init do not go together.
        """
        if (self.kind, self.init == "pissa") not in _LAYERS:
            raise ConfigError(
                f"lora_init: pissa: not with adapter: {self.kind}. Use adapter: lora, or another lora_init."
            )
        if self.rank < 1:
            raise ConfigError(f"lora_rank: {self.rank} is not a rank; use 1 or more, 8 is a good start.")
        if self.kind in ("lokr", "oft"):  # a LoKr has whole factors where the rank is too large, an OFT fits its blocks
            return
        room = {name: min(weight_shape(layer)[0], math.prod(weight_shape(layer)[1:])) for name, layer in layers.items()}
        too_small = [name for name, layer in layers.items() if room[name] < self.rank_of(name, layer)]
        if too_small:
            smallest = min(too_small, key=room.__getitem__)
            rank, others = self.rank_of(smallest, layers[smallest]), len(too_small) - 1
            nor = f" (nor can {others} other layer{'' if others == 1 else 's'})" if others else ""
            raise ConfigError(
                f"lora_rank: {rank} is more than {smallest} can use{nor}; the largest possible rank here is "
                f"{room[smallest]}. Lower lora_rank, or leave the layer out of target_modules."
            )


def is_convolution(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether the layer looks at neighbours: a 1 x 1 convolution is a linear layer on every pixel."""
    return isinstance(layer, nn.Conv2d) and any(side != 1 for side in layer.kernel_size)
