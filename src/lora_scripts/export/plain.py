"""The one kind of adapter that every loader of language models reads rightly: plain LoRA, one rank, one whole alpha."""

from __future__ import annotations

from lora_scripts.adapters.weights import LoRATensors, LoRAWeights
from lora_scripts.errors import ExportError

__all__ = ["pad_rank", "plain_scale"]


def plain_scale(weights: LoRAWeights) -> tuple[int, int]:
    """(rank, alpha) that all layers share; alpha is a whole number.

    Raises:
        ExportError: there is no layer, or ranks or alphas differ, or alpha is not whole: some loaders read one of each
            for the whole adapter and would apply the others wrongly without a word.
    """
    if not weights:
        raise ExportError("Export failed: there is no LoRA layer to write.")
    ranks = sorted({lora.rank for lora in weights.values()})
    alphas = sorted({lora.alpha for lora in weights.values()})
    if len(ranks) > 1 or len(alphas) > 1 or not float(alphas[0]).is_integer() or alphas[0] <= 0:
        raise ExportError(
            f"Export failed: the adapter is not plain LoRA (ranks {_shown(ranks)}, alphas {_shown(alphas)}). Loaders of "
            "language models need one rank and one whole alpha for all layers: bake the adapter first."
        )
    return ranks[0], int(alphas[0])


def pad_rank(weights: LoRAWeights, rank: int) -> dict[str, LoRATensors]:
    """The same changes with lora_A [rank, in] and lora_B [out, rank]: what is added is zeros.

    The scale alpha / rank is kept. Where that would take an alpha that is not whole, alpha is rounded and lora_B carries
    the rest.

    Raises:
        ExportError: not plain LoRA, or of a higher rank already.
    """
    import torch

    old_rank, old_alpha = plain_scale(weights)
    if old_rank > rank:
        raise ExportError(f"Export failed: the adapter's rank is {old_rank}, which does not fit into {rank}.")
    exact = old_alpha * rank / old_rank
    alpha = max(1, round(exact))
    padded = {}
    for layer, lora in weights.items():
        down = torch.nn.functional.pad(lora.lora_A.detach(), (0, 0, 0, rank - old_rank))
        up = torch.nn.functional.pad(lora.lora_B.detach(), (0, rank - old_rank))
        padded[layer] = LoRATensors(down, up if exact == alpha else (up.float() * (exact / alpha)), float(alpha))
    return padded


def _shown(values: list[int] | list[float]) -> str:
    texts = [f"{value:g}" for value in values]
    return ", ".join(texts[:5]) + (", ..." if len(texts) > 5 else "")
