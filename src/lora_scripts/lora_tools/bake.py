"""An adapter file of any kind as a plain LoRA, layer by layer.

| kind | how | exact |
|---|---|---|
| LoRA | as it is, scale folded in | yes |
| LoHa, LoKr | as a plain LoRA of a higher rank, cut to the rank chosen | if that rank is high enough |
| DoRA, OFT | largest singular values of what they do to the base model's weight | no |
| whole difference, Tucker core | largest singular values | if the rank is high enough |
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from lora_scripts.errors import ConfigError
from lora_scripts.lora_tools.finished import rounded
from lora_scripts.lora_tools.ranks import LayerCut, Losses, RankChoice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.adapter_files.adapter_file import AdapterFile
    from lora_scripts.adapters.spectrum import Spectrum
    from lora_scripts.adapters.weights import LayerChange, LoRATensors

__all__ = ["BaseWeight", "bake_file", "needs_base"]

BaseWeight: TypeAlias = "Callable[[str], Tensor]"
"""Layer to its frozen weight in float32: `LayerFiles.weight`."""

_DEPENDENT = ("dora", "oft")
"""Kinds whose change depends on the weight that they meet."""
_FLAT = ("loha", "lokr")
"""Kinds that store the kernel of a convolution flat, so that only a model tells its shape."""


def needs_base(file: AdapterFile) -> str | None:
    """Why the file can only be baked beside its base model, or None."""
    for layer in file.layers.values():
        if layer.kind in _DEPENDENT:
            return f"{layer.file_name} depends on the weights that it is trained on"
        if layer.kind in _FLAT and layer.model_shape is None and not layer.known:
            return f"the shape of {layer.file_name} is not in the file, and its model is not known"
    return None


def bake_file(
    file: AdapterFile, choice: RankChoice, dtype: torch.dtype, base_weight: BaseWeight | None = None
) -> tuple[dict[str, LoRATensors], Losses]:
    """The file's layers as plain LoRAs of the ranks chosen, with one alpha for all, and what that leaves out.

    A plain LoRA keeps its rank, also above the one chosen.

    Args:
        dtype: of the matrices that come out.
    Raises:
        ConfigError: the base model is needed and not given.
        ModelError: the file is damaged, or of a kind that is not read.
    """
    import torch

    from lora_scripts.adapters.spectrum import concatenated
    from lora_scripts.adapters.weights import LoRATensors

    if base_weight is None and (why := needs_base(file)):
        raise ConfigError(f"{file.path}: {why}. Name the model that it was trained on with --base-model.")
    plain_ranks = [layer.rank or 1 for layer in file.layers.values() if layer.kind == "lora"]
    others = any(layer.kind != "lora" for layer in file.layers.values())
    # One alpha for all layers, whatever their rank: diffusers misreads a file whose middle block has another one.
    alpha = float(max([*plain_ranks, *([choice.highest] if others else [])]))
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, LoRATensors] = {}
    losses = Losses()
    for name, change in file.changes():
        if isinstance(change, LoRATensors) and change.magnitude is None:
            weights[name] = rounded(concatenated([(change, 1.0)], alpha), dtype)
            losses.cuts.append(
                LayerCut(name, change.rank, change.rank, float(change.delta().double().square().sum()), 0.0)
            )
            continue
        weight = None if file.layers[name].kind not in _DEPENDENT or base_weight is None else base_weight(name)
        spectrum = _spectrum(change, weight, choice.highest, generator)
        rank = choice.of(spectrum)
        weights[name] = rounded(spectrum.cut(rank, alpha / rank), dtype)
        losses.cuts.append(LayerCut(name, change.rank, rank, spectrum.size, spectrum.lost(rank)))
    return weights, losses


def _spectrum(change: LayerChange, weight: Tensor | None, most: int, generator: torch.Generator) -> Spectrum:
    """All singular values of a change that has a plain form of low rank, else the `most` largest."""
    from lora_scripts.adapters.plain_forms import plain_form
    from lora_scripts.adapters.spectrum import spectrum_of_matrix, spectrum_of_sum

    plain = plain_form(change, min(change.shape[0], prod(change.shape[1:])) - 1)
    if plain is not None:
        return spectrum_of_sum([(plain, 1.0)])
    return spectrum_of_matrix(change.delta(weight), most, generator)
