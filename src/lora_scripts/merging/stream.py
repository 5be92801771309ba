"""A weights file copied tensor by tensor, with low-rank changes added to some on the way.

Nothing here knows what kind of model the file holds. At any time one tensor is in memory, and a few rows of it in float32.

Legend for shapes: R rank, in/out the layer's features or channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import ModelError
from lora_scripts.models.weights_file import WeightsHeader, check_finite, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Change", "PlannedTensor", "add_changes", "write_merged_file"]

_ROWS_BYTES = 32_000_000
"""Room for the rows that are in float32 at a time."""
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Change:
    """One LoRA layer at a strength."""

    lora: LoRATensors
    weight: float


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the new file: one of the old file, by its name there, with changes."""

    name: str
    source: str
    changes: Sequence[Change] = ()


def write_merged_file(header: WeightsHeader, plan: Sequence[PlannedTensor], target: Path) -> None:
    """Writes the planned tensors in the order of the plan, each in the dtype it has in the old file.

    Raises:
        ModelError: a changed tensor is quantised or of another shape, or a number is no longer finite in its dtype.
    """
    for planned in plan:
        _check_fits(header, planned)
    with target.open("wb") as file:
        file.write(_header_bytes(header, plan))
        for planned in plan:
            _copy(header, planned, file)


def add_changes(weight: Tensor, changes: Sequence[Change]) -> None:
    """Adds low-rank changes to a weight in place; computed in float32, rounded once to the weight's dtype.

    Args:
        weight: [out, in] or [out, in, k, k].
    """
    flat = weight.flatten(1)  # a view: what is read from a file is contiguous
    downs = [change.lora.lora_A.float().flatten(1) for change in changes]
    rows = max(1, _ROWS_BYTES // (4 * flat.shape[1]))
    for start in range(0, flat.shape[0], rows):
        part = flat[start : start + rows]
        total = part.float()
        for change, down in zip(changes, downs, strict=True):
            up = change.lora.lora_B[start : start + rows].float().flatten(1)
            total = total.addmm(up, down, alpha=change.weight * change.lora.scale)
        part.copy_(total)


def _check_fits(header: WeightsHeader, planned: PlannedTensor) -> None:
    info = header.tensors[planned.source]
    if planned.changes and info.dtype not in _FLOATS:
        raise ModelError(
            f"{header.path}: {planned.source} is stored as {info.dtype}: the model is quantised, and adding to rounded "
            "weights would lose most of what was trained. Merge into the original model and quantise the result."
        )
    for change in planned.changes:
        given = (change.lora.lora_B.shape[0], *change.lora.lora_A.shape[1:])
        if given != info.shape:
            raise ModelError(
                f"{header.path}: {planned.source} is {list(info.shape)}, the LoRA changes a layer of {list(given)}. It was "
                "made for another base model."
            )


def _header_bytes(header: WeightsHeader, plan: Sequence[PlannedTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **header.metadata}}
    position = 0
    for planned in plan:
        info = header.tensors[planned.source]
        end = position + info.num_bytes
        entries[planned.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8, as the format asks
    return len(encoded).to_bytes(8, "little") + encoded


def _copy(header: WeightsHeader, planned: PlannedTensor, file: BinaryIO) -> None:
    """A function of its own, so that one tensor is let go before the next is read."""
    import torch

    [(_, tensor)] = read_tensors(header, [planned.source])
    if planned.changes:
        add_changes(tensor, planned.changes)
        check_finite(tensor, planned.name, file.name)
    if tensor.numel():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
