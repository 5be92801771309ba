"""The one kind of adapter that every loader of language models reads rightly: plain LoRA, one rank, one whole alpha."""

from __future__ import annotations

from lora_scripts.adapters.weights import LoRAWeights, require_plain
from lora_scripts.errors import ExportError

__all__ = ["plain_scale"]


def plain_scale(weights: LoRAWeights) -> tuple[int, int]:
    """(rank, alpha) that all layers share; alpha is a whole number.

    Raises:
        ExportError: there is no layer, or ranks or alphas differ, or alpha is not whole: some loaders read one of each
            for the whole adapter and would apply the others wrongly without a word.
    """
    if not weights:
        raise ExportError("Export failed: there is no LoRA layer to write.")
    require_plain(weights)
    ranks = sorted({lora.rank for lora in weights.values()})
    alphas = sorted({lora.alpha for lora in weights.values()})
    if len(ranks) > 1 or len(alphas) > 1 or not float(alphas[0]).is_integer() or alphas[0] <= 0:
        raise ExportError(
            f"Export failed: the adapter is not plain LoRA (ranks {_shown(ranks)}, alphas {_shown(alphas)}). Loaders of "
            "language models need one rank and one whole alpha for all layers: bake it first (lora_scripts.export.bake)."
        )
    return ranks[0], int(alphas[0])


def _shown(values: list[int] | list[float]) -> str:
    texts = [f"{value:g}" for value in values]
    return ", ".join(texts[:5]) + (", ..." if len(texts) > 5 else "")
