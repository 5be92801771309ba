"""How a rank is chosen for each layer, and what the choice leaves out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from lora_scripts.adapters.spectrum import Spectrum

__all__ = ["LayerCut", "Losses", "RankChoice", "add_rank_arguments", "rank_choice"]

HIGHEST_RANK = 1024


@dataclass(frozen=True)
class RankChoice:
    """The rank of every layer, or the share of its squared Frobenius norm that each keeps.

    Attributes:
        rank: of every layer; None where `keep` decides.
        keep: above 0, at most 1: each layer gets the smallest rank that keeps this share.
        most: no layer gets a higher rank.
    """

    rank: int | None = None
    keep: float | None = None
    most: int = HIGHEST_RANK

    @property
    def highest(self) -> int:
        """The highest rank that can come out."""
        return min(self.most, self.rank or self.most)

    def of(self, spectrum: Spectrum) -> int:
        """The rank for one layer; never above the number of values that its shape allows."""
        wanted = self.rank if self.keep is None else spectrum.rank_for(self.keep)
        assert wanted is not None, "one of rank and keep"
        return min(wanted, self.most, len(spectrum.values))


@dataclass(frozen=True)
class LayerCut:
    """What became of one layer: squared Frobenius norms of the whole change and of what the cut left out."""

    layer: str
    before: int
    rank: int
    size: float
    lost: float

    @property
    def share_lost(self) -> float:
        """Norm of what is left out over the norm of the change."""
        return (self.lost / self.size) ** 0.5 if self.size else 0.0

    def __str__(self) -> str:
        kept = 1 - self.share_lost**2
        return f"{self.layer}: rank {self.before} -> {self.rank}, keeps {kept:.2%} of its squared norm"


@dataclass
class Losses:
    """The cuts of all layers, and what they amount to."""

    cuts: list[LayerCut] = field(default_factory=list)

    @property
    def share_lost(self) -> float:
        """Norm of everything left out over the norm of the whole change, both over all layers together."""
        size = sum(cut.size for cut in self.cuts)
        return (sum(cut.lost for cut in self.cuts) / size) ** 0.5 if size else 0.0

    @property
    def worst(self) -> LayerCut:
        return max(self.cuts, key=lambda cut: cut.share_lost)

    @property
    def ranks(self) -> str:
        """`16`, or `4 to 32`."""
        ranks = sorted({cut.rank for cut in self.cuts})
        return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"

    def __str__(self) -> str:
        if self.share_lost < 1e-6:
            return "nothing of the change is lost"
        worst = self.worst
        return (
            f"keeps {1 - self.share_lost**2:.2%} of the squared Frobenius norm (the part left out is {self.share_lost:.1%} as "
            f"long as the change; at worst {worst.share_lost:.1%}, in {worst.layer})"
        )


def add_rank_arguments(parser: argparse._ActionsContainer) -> None:
    """`--rank`, `--keep` and `--max-rank`."""
    parser.add_argument("--rank", type=int, help="rank of every layer")
    parser.add_argument(
        "--keep",
        type=float,
        help="instead of --rank: the smallest rank of each layer that keeps this share of the squared Frobenius norm of its "
        "change, such as 0.98",
    )
    parser.add_argument("--max-rank", type=int, help="with --keep: no layer gets a higher rank")


def rank_choice(rank: int | None, keep: float | None, max_rank: int | None) -> RankChoice:
    """The choice that the arguments make.

    Raises:
        ConfigError: neither or both are given, or one is out of range.
    """
    if (rank is None) == (keep is None):
        raise ConfigError(
            "Give --rank (the same for every layer) or --keep (a share such as 0.98), and only one of them."
        )
    if max_rank is not None and keep is None:
        raise ConfigError(
            "--max-rank: has an effect with --keep alone. Leave it out, or give --keep in place of --rank."
        )
    for name, value in (("--rank", rank), ("--max-rank", max_rank)):
        if value is not None and not 1 <= value <= HIGHEST_RANK:
            raise ConfigError(f"{name}: must be from 1 to {HIGHEST_RANK}.")
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError("--keep: must be above 0 and at most 1, such as 0.98.")
    return RankChoice(rank, keep, max_rank or HIGHEST_RANK)
