"""Any adapter as the plain LoRA that every program reads rightly: integer alpha, one rank, nothing else.

| adapter | how | exact |
|---|---|---|
| rsLoRA, or an alpha with a fraction | scale folded into lora_B | yes |
| PiSSA | its change B A - B0 A0 has rank 2 R (`Adapter.weights` states it so) | yes |
| unequal ranks | rows of zeros | yes |
| LoHa, LoKr of low rank | sums of products, see `adapters.plain_forms` | yes, up to 8 times the trained rank |
| DoRA, OFT, LoHa and LoKr beyond that | largest singular values of the whole change | no; the error is stated |

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from lora_scripts.adapters.weights import LayerChange, LayerChanges, LoRATensors, kind_name
from lora_scripts.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GROWTH", "Baked", "BaseWeight", "bake", "bake_kinds"]

BaseWeight: TypeAlias = "Callable[[str], Tensor]"
"""Layer name with its component in front, to the frozen weight, float32, [out, in] or [out, in, k, k]: `Adapter.base_weight`."""

GROWTH = (1, 2, 4, 8)
"""Ranks tried for a change that has no exact form, as multiples of the trained one."""
GOOD_ENOUGH = 0.05
"""Error of a baked change below which no higher rank is tried."""


@dataclass(frozen=True)
class Baked:
    """What became of an adapter.

    Attributes:
        rank: of every layer; the highest, where nothing was to be done.
        num_approximated: layers whose change was approximated.
        kind: what was trained where that is another kind than plain LoRA, in words: "LoHa".
        error: Frobenius norm of what the plain LoRA lacks, over that of the whole change; 0 where nothing was approximated.
        worst_layer, worst_error: the layer with the largest such share; empty and 0 where nothing was approximated.
        folded: whether scales went into lora_B.
        padded: how many layers got rows of zeros.
    """

    rank: int
    num_layers: int
    num_approximated: int = 0
    error: float = 0.0
    worst_layer: str = ""
    worst_error: float = 0.0
    folded: bool = False
    padded: int = 0
    kind: str = ""

    @property
    def exact(self) -> bool:
        return self.num_approximated == 0

    def __str__(self) -> str:
        if not self.exact:
            return (
                f"{self.kind} baked into a plain LoRA of rank {self.rank}: {self.error:.1%} of the trained change is not in it "
                f"(Frobenius norm; {self.worst_error:.1%} of {self.worst_layer}, the worst of {self.num_layers} layers)"
            )
        how = [
            *(["scale folded into lora_B"] if self.folded else []),
            *([f"{self.padded} layers padded with zeros"] if self.padded else []),
        ]
        if self.kind:
            return f"{', '.join([f'{self.kind} baked into a plain LoRA of rank {self.rank}', *how])}: nothing lost"
        return f"plain LoRA of rank {self.rank}, {', '.join(how) or 'as trained'}: nothing lost"


def bake(
    weights: LayerChanges, base_weight: BaseWeight | None = None, *, ranks: Sequence[int] | None = None
) -> tuple[dict[str, LoRATensors], Baked]:
    """The same change as plain LoRA tensors with one whole-numbered alpha and one rank.

    What is so already keeps its bits.

    Args:
        base_weight: needed for a DoRA or an OFT alone.
        ranks: those that the reader knows, as `vllm.VLLM_RANKS`; the next one is filled up to with zeros.
    Raises:
        ExportError: the rank is above all of `ranks`.
    """
    plain, baked = _as_products(weights, base_weight)
    rank = _allowed(baked.rank, ranks)
    alphas = {tensors.alpha for tensors in plain.values()}
    padded = sum(tensors.rank != rank for tensors in plain.values())
    folded = bool(padded) or len(alphas) > 1 or not all(alpha.is_integer() for alpha in alphas)
    if folded:
        plain = {name: _scaled_and_padded(tensors, rank) for name, tensors in plain.items()}
    return plain, replace(baked, rank=rank, folded=folded, padded=padded)


def bake_kinds(weights: LayerChanges, base_weight: BaseWeight) -> tuple[dict[str, LoRATensors], Baked]:
    """Other kinds as `bake` makes them; LoRAs of one alpha as they are, to the bit, for files that may hold any alpha and rank.

    All layers get one alpha: diffusers applies a kohya file's alpha to attention layers only where it is that of most layers. The
    baked ones get one rank too, even where that is more than a small layer can use.
    """
    plain = {name: change for name, change in weights.items() if isinstance(change, LoRATensors)}
    if len(plain) < len(weights) or any(tensors.magnitude is not None for tensors in plain.values()):
        return bake(weights, base_weight)
    alphas = Counter(tensors.alpha for tensors in plain.values())
    if len(alphas) > 1:
        plain = {name: _at_alpha(tensors, alphas.most_common(1)[0][0]) for name, tensors in plain.items()}
    return plain, Baked(max((t.rank for t in plain.values()), default=0), len(plain), folded=len(alphas) > 1)


def _at_alpha(tensors: LoRATensors, alpha: float) -> LoRATensors:
    """The same change with another alpha."""
    if tensors.alpha == alpha:
        return tensors
    return replace(tensors, lora_B=tensors.lora_B.double().mul(tensors.alpha / alpha).float(), alpha=alpha)


def _as_products(weights: LayerChanges, base_weight: BaseWeight | None = None) -> tuple[dict[str, LoRATensors], Baked]:
    """Every layer as a plain LoRA: as it is, in its exact form, or as the one that comes nearest to it.

    All approximated layers get the rank, as a multiple of the trained one, at which the whole adapter's error is small enough,
    or the largest multiple.
    """
    from lora_scripts.adapters.plain_forms import plain_form

    if not weights:
        raise ExportError("Export failed: there is no LoRA layer to bake.")
    exact = {name: plain_form(change, change.rank * GROWTH[-1]) for name, change in weights.items()}
    plain = {name: tensors for name, tensors in exact.items() if tensors is not None}
    candidates = {name: _nearest(change, base_weight, name) for name, change in weights.items() if name not in plain}
    if not candidates:
        other = next((change for change in weights.values() if not isinstance(change, LoRATensors)), None)
        kind = "" if other is None else kind_name(other)
        return plain, Baked(max(tensors.rank for tensors in plain.values()), len(plain), kind=kind)
    size = sum(candidate.size for candidate in candidates.values())

    def lacking(step: int) -> float:
        return (sum(c.missing[step] for c in candidates.values()) / size) ** 0.5 if size else 0.0

    step = next((i for i in range(len(GROWTH)) if lacking(i) <= GOOD_ENOUGH), len(GROWTH) - 1)
    shares = {name: (c.missing[step] / c.size) ** 0.5 if c.size else 0.0 for name, c in candidates.items()}
    for name, candidate in candidates.items():
        plain[name] = candidate.at(weights[name].rank * GROWTH[step])
    worst = max(shares, key=shares.__getitem__)
    rank = max(tensors.rank for tensors in plain.values())
    plain = {name: plain[name] for name in weights}  # in the model's order
    found = Baked(rank, len(plain), len(candidates), lacking(step), worst, shares[worst])
    return plain, replace(found, kind=kind_name(weights[worst]))


@dataclass(frozen=True)
class _Candidate:
    """A layer's change at the highest rank tried, largest singular values first.

    Attributes:
        size: squared Frobenius norm of the whole change.
        missing: the same of what is lacking at each rank tried.
    """

    lora_A: Tensor
    lora_B: Tensor
    size: float
    missing: Sequence[float]

    def at(self, rank: int) -> LoRATensors:
        rank = min(rank, self.lora_A.shape[0])
        return LoRATensors(self.lora_A[:rank].clone(), self.lora_B[:, :rank].clone(), float(rank))


def _nearest(tensors: LayerChange, base_weight: BaseWeight | None, name: str) -> _Candidate:
    import torch

    from lora_scripts.adapters.principal import principal_part

    with torch.no_grad():
        change = tensors.delta(None if base_weight is None else base_weight(name))
        matrix = change.flatten(1)
        most = min(tensors.rank * GROWTH[-1], *matrix.shape)
        A, B = principal_part(matrix, most, 1.0, torch.Generator().manual_seed(0))
        tried = [min(tensors.rank * growth, most) for growth in GROWTH]
        missing = [float((matrix - B[:, :rank] @ A[:rank]).double().square().sum()) for rank in tried]
        A, B = A.reshape(most, *change.shape[1:]), B.reshape(-1, most, *[1] * (change.ndim - 2))
    return _Candidate(A.cpu(), B.cpu(), float(matrix.double().square().sum()), missing)


def _allowed(rank: int, ranks: Sequence[int] | None) -> int:
    if ranks is None:
        return rank
    larger = [known for known in sorted(ranks) if known >= rank]
    if not larger:
        raise ExportError(
            f"Export failed: rank {rank} is above what this reader knows ({', '.join(map(str, sorted(ranks)))}). "
            "Train with a lower lora_rank, or merge the adapter into its model."
        )
    return larger[0]


def _scaled_and_padded(tensors: LoRATensors, rank: int) -> LoRATensors:
    """The same change with alpha = rank: a scale of 1."""
    import torch

    down, up = tensors.lora_A.float(), tensors.lora_B.double().mul(tensors.scale).float()
    more = rank - tensors.rank
    if more:
        down = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
        up = torch.cat([up, up.new_zeros(up.shape[0], more, *up.shape[2:])], dim=1)
    return LoRATensors(down, up, float(rank))
