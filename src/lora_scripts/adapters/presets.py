"""Ranks and rates of blocks for three usual aims, from what is known of the blocks of a U-Net.

A family says which of its blocks decide what is in the picture ("content") and which how it looks ("look"): the inner blocks, at
the lowest resolutions, carry shape and arrangement, the outer ones colour and texture (Voynov et al. 2023, arXiv 2303.09522, for
Stable Diffusion 1; Frenkel et al. 2024, arXiv 2403.14572, for SDXL, where two neighbouring attentions divide it). A block that does
not matter for the aim gets less rank, so that it has no room for what shall stay as it is, and half the rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lora_scripts.adapters.blocks import block_of, short_name

__all__ = ["PRESETS", "BlockRoles", "PresetName", "with_preset"]

PresetName = Literal["none", "style", "character", "concept"]
BlockRoles = Mapping[str, tuple[str, ...]]
"""Role, "content" or "look", to the blocks that have it."""


@dataclass(frozen=True)
class Preset:
    """What the blocks of each role get: a share of the rank, and of the learning rate."""

    ranks: Mapping[str, float]
    rates: Mapping[str, float]


PRESETS: Mapping[str, Preset] = {
    "none": Preset({}, {}),
    "style": Preset({"content": 0.25}, {"content": 0.5}),
    "character": Preset({"look": 0.5}, {}),
    "concept": Preset({"look": 0.25}, {"look": 0.5}),
}


def with_preset(
    name: PresetName,
    roles: BlockRoles,
    layers: Iterable[str],
    rank: int,
    rate: float,
    own_ranks: Mapping[str, int],
    own_rates: Mapping[str, float],
) -> tuple[dict[str, int], dict[str, float]]:
    """Ranks and rates by block: the preset's, and in place of them the user's own for all that lies in his blocks.

    Args:
        layers: those that train; blocks without any are left out.
        rank, rate: `lora_rank` (or the size of an OFT's blocks) and `learning_rate`.
    """
    layers, preset = list(layers), PRESETS[name]

    def blocks(shares: Mapping[str, float], own: Iterable[str]) -> dict[str, float]:
        """The preset's blocks with their shares, without what lies in the user's own."""
        users = [f"{short_name(block)}." for block in own]
        return {
            block: share
            for role, share in shares.items()
            for block in roles.get(role, ())
            if not f"{block}.".startswith(tuple(users)) and any(block_of(layer, [block]) for layer in layers)
        }

    ranks = {block: max(1, round(share * rank)) for block, share in blocks(preset.ranks, own_ranks).items()}
    rates = {block: share * rate for block, share in blocks(preset.rates, own_rates).items()}
    return {**ranks, **own_ranks}, {**rates, **own_rates}
