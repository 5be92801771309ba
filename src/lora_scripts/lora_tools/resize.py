"""A LoRA file at another rank: each layer cut to its largest singular values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.lora_tools.finished import require_plain_file, rounded
from lora_scripts.lora_tools.ranks import LayerCut, Losses, RankChoice

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapter_files.adapter_file import AdapterFile
    from lora_scripts.adapters.weights import LoRATensors

__all__ = ["history_line", "resize_file"]


def resize_file(
    file: AdapterFile, linear: RankChoice, conv: RankChoice, dtype: torch.dtype
) -> tuple[dict[str, LoRATensors], Losses]:
    """The file's layers at the ranks chosen, and what was cut off.

    No layer gets a rank above the one it has: its change has no more to it. Every layer gets the same alpha, whatever its
    rank, with the rest of the scale in the matrices: diffusers misreads a file whose middle block has another alpha.

    Args:
        linear, conv: for layers with 1x1 kernels or none, and for those with larger ones.
        dtype: of the matrices that come out.
    Raises:
        ModelError: the file is damaged, or a layer is no plain LoRA.
    """
    from lora_scripts.adapters.spectrum import spectrum_of_sum
    from lora_scripts.adapters.weights import LoRATensors

    require_plain_file(file)
    alpha = float(max(_highest(layer.rank or 1, linear, conv) for layer in file.layers.values()))
    weights: dict[str, LoRATensors] = {}
    losses = Losses()
    for name, layer in file.changes():
        assert isinstance(layer, LoRATensors), "the file was found to be plain"
        spectrum = spectrum_of_sum([(layer, 1.0)])
        choice = conv if len(layer.shape) == 4 and layer.shape[2] * layer.shape[3] > 1 else linear
        rank = min(choice.of(spectrum), layer.rank)
        weights[name] = rounded(spectrum.cut(rank, alpha / rank), dtype)
        losses.cuts.append(LayerCut(name, layer.rank, rank, spectrum.size, spectrum.lost(rank)))
    return weights, losses


def _highest(rank: int, linear: RankChoice, conv: RankChoice) -> int:
    return min(rank, max(linear.highest, conv.highest))


def history_line(path: Path, before: str, losses: Losses) -> str:
    """What the header of the new file says of its making."""
    return f"resized from {path.name}, rank {before} to {losses.ranks}: {losses}"
