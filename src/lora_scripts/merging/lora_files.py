"""Several LoRA files added up into one, each at a weight: exactly, or cut to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from lora_scripts.errors import ModelError
from lora_scripts.lora_tools.finished import require_plain_file, rounded
from lora_scripts.lora_tools.ranks import LayerCut, Losses, RankChoice

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapter_files.adapter_file import AdapterFile
    from lora_scripts.adapters.weights import LoRATensors

__all__ = ["Method", "joined_texts", "require_one_model", "sum_files"]

Method = Literal["concat", "svd"]
WeightedFiles: TypeAlias = "Sequence[tuple[AdapterFile, float]]"

_OF_THE_MODEL = (
    "ss_base_model_version",
    "ss_v2",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_resolution",
    "ss_clip_skip",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.resolution",
    "modelspec.prediction_type",
)
"""Header texts that stay true of a sum, where all files agree; those on one file's training would not."""


def require_one_model(files: Sequence[AdapterFile]) -> None:
    """Does nothing where all files are plain LoRAs for one kind of model, and share at least a layer's name where they can.

    Raises:
        ModelError: names two that do not go together.
    """
    for file in files:
        require_plain_file(file)
    first = files[0]
    for other in files[1:]:
        if other.architecture != first.architecture:
            raise ModelError(
                f"{first.path} was made for {first.title}, {other.path} for {other.title}: they cannot be added up."
            )


def sum_files(
    files: WeightedFiles, method: Method, rank: int | None, dtype: torch.dtype
) -> tuple[dict[str, LoRATensors], Losses]:
    """Every layer that any file has, as the weighted sum of the files' changes.

    Args:
        method: "concat" stacks the matrices: exact, of rank R1 + R2 + ...; "svd" cuts the sum to `rank`.
        dtype: of the matrices that come out.
    Raises:
        ModelError: two files have a layer in different shapes, or one is damaged.
    """
    from lora_scripts.adapters.spectrum import concatenated, spectrum_of_sum

    layers = list(dict.fromkeys(name for file, _ in files for name in file.layers))
    ranks = {name: sum(file.layers[name].rank or 0 for file, _ in files if name in file.layers) for name in layers}
    choice = RankChoice(rank)
    # One alpha for all layers, whatever their rank: diffusers misreads a file whose middle block has another one.
    alpha = float(max(ranks.values()) if rank is None else min(rank, max(ranks.values())))
    weights: dict[str, LoRATensors] = {}
    losses = Losses()
    for name in layers:
        parts = _parts(files, name)
        if method == "concat":
            weights[name] = rounded(concatenated(parts, alpha), dtype)
            continue
        spectrum = spectrum_of_sum(parts)
        cut = min(choice.of(spectrum), ranks[name])
        weights[name] = rounded(spectrum.cut(cut, alpha / cut), dtype)
        losses.cuts.append(LayerCut(name, ranks[name], cut, spectrum.size, spectrum.lost(cut)))
    return weights, losses


def _parts(files: WeightedFiles, name: str) -> list[tuple[LoRATensors, float]]:
    from lora_scripts.adapters.weights import LoRATensors

    parts: list[tuple[LoRATensors, float]] = []
    for file, strength in files:
        if name not in file.layers:
            continue
        layer = file.layer(name)
        assert isinstance(layer, LoRATensors), "the file was found to be plain"
        if parts:
            layer = _shaped_like(layer, parts[0][0], file, name)
        parts.append((layer, strength))
    return parts


def _shaped_like(layer: LoRATensors, other: LoRATensors, file: AdapterFile, name: str) -> LoRATensors:
    """A 1x1 convolution and a linear layer are the same thing, spelt in two ways."""
    from lora_scripts.adapters.weights import LoRATensors

    kernel = (*layer.shape[2:], 1, 1)[:2]
    if layer.shape[:2] != other.shape[:2] or kernel != (*other.shape[2:], 1, 1)[:2]:
        raise ModelError(
            f"{file.path}: {name} is {list(layer.shape)}, in the file before it {list(other.shape)}: the two were made for "
            "different models and cannot be added up."
        )
    return LoRATensors(
        layer.lora_A.reshape(layer.rank, *other.shape[1:]),
        layer.lora_B.reshape(-1, layer.rank, *[1] * (len(other.shape) - 2)),
        layer.alpha,
    )


def joined_texts(files: WeightedFiles) -> dict[str, str]:
    """Header texts that are true of the sum: what all files say of the model, and all their trigger words."""
    texts = {
        key: value
        for key, value in files[0][0].metadata.items()
        if key in _OF_THE_MODEL and all(file.metadata.get(key, value) == value for file, _ in files)
    }
    triggers = dict.fromkeys(file.metadata.get("modelspec.trigger_phrase", "") for file, _ in files)
    if joined := ", ".join(trigger for trigger in triggers if trigger):
        texts["modelspec.trigger_phrase"] = joined
    return texts
