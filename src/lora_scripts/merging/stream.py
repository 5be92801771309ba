"""A weights file copied tensor by tensor, with changes added to some on the way.

Nothing here knows what kind of model the file holds, nor what kind of adapter the changes come from. At any time one tensor
is in memory, the changes that it gets, and a few rows of it in float32; of an adapter that is no plain LoRA the whole layer
in float32 two or three times.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_scripts.adapters.weights import LayerChange, LoRATensors
from lora_scripts.atomic_file import new_file
from lora_scripts.errors import ModelError
from lora_scripts.models.layout_names import Place
from lora_scripts.models.weights_file import WeightsHeader, check_finite, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Change", "PlannedTensor", "add_changes", "write_merged_file"]

_ROWS_BYTES = 32_000_000
"""Room for the rows that are in float32 at a time."""
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Change:
    """The change of one layer at a strength.

    Attributes:
        shape: of the layer's weight, [out, in] or [out, in, k, k].
        read: gives the change; called when it is the tensor's turn, so that files can be read layer by layer.
    """

    shape: tuple[int, ...]
    read: Callable[[], LayerChange]
    weight: float

    @classmethod
    def of(cls, change: LayerChange, weight: float) -> Change:
        """Of a change that is in memory."""
        return cls(tuple(change.shape), lambda: change, weight)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the new file: one of the old file, by its name there, with changes.

    Attributes:
        changes: by the part of the tensor that is the layer's weight; None for all of it.
    """

    name: str
    source: str
    changes: Mapping[Place | None, Sequence[Change]] = field(default_factory=dict)


def write_merged_file(
    header: WeightsHeader, plan: Sequence[PlannedTensor], target: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the planned tensors in the order of the plan, each in the dtype it has in the old file.

    Args:
        metadata: header texts; None for those of the old file.
    Raises:
        ModelError: a changed tensor is quantised or of another shape, or a number is no longer finite in its dtype.
        DataError: the disk is full, or the place cannot be written.
    """
    for planned in plan:
        _check_fits(header, planned)
    head = _header_bytes(header, plan, header.metadata if metadata is None else metadata)
    with new_file(target, len(head) + sum(header.tensors[planned.source].num_bytes for planned in plan)) as file:
        file.write(head)
        for planned in plan:
            _copy(header, planned, file, target)


def add_changes(weight: Tensor, changes: Sequence[Change]) -> None:
    """Adds changes to a weight in place; computed in float32 from the weight as it is, rounded once to its dtype.

    Args:
        weight: [out, in] or [out, in, k, k]; may be a view into a larger tensor.
    """
    read = [(change.read(), change.weight) for change in changes]
    low_rank = [(change, strength) for change, strength in read if _is_plain(change)]
    whole = [(change, strength) for change, strength in read if not _is_plain(change)]
    if whole:
        before = weight.float()
        total = before.clone()
        for change, strength in whole:
            total.add_(change.delta(before).reshape(total.shape), alpha=strength)
        _add_low_rank(total, low_rank, weight)
    else:
        _add_low_rank(weight, low_rank, weight)


def _is_plain(change: LayerChange) -> bool:
    return isinstance(change, LoRATensors) and change.magnitude is None


def _add_low_rank(weight: Tensor, loras: Sequence[tuple[LayerChange, float]], target: Tensor) -> None:
    """Writes weight + the plain LoRAs into the target, a few rows at a time."""
    downs = [lora.lora_A.float().flatten(1) for lora, _ in loras if isinstance(lora, LoRATensors)]
    rows = max(1, _ROWS_BYTES // (4 * weight[0].numel()))
    for start in range(0, weight.shape[0], rows):
        part = target[start : start + rows]
        total = weight[start : start + rows].float().flatten(1)
        for (lora, strength), down in zip(loras, downs, strict=True):
            assert isinstance(lora, LoRATensors), "the others were added as a whole"
            up = lora.lora_B[start : start + rows].float().flatten(1)
            total = total.addmm(up, down, alpha=strength * lora.scale)
        part.copy_(total.reshape(part.shape))


def _check_fits(header: WeightsHeader, planned: PlannedTensor) -> None:
    info = header.tensors[planned.source]
    if planned.changes and info.dtype not in _FLOATS:
        raise ModelError(
            f"{header.path}: {planned.source} is stored as {info.dtype}: the model is quantised, and adding to rounded "
            "weights would lose most of what was trained. Merge into the original model and quantise the result."
        )
    for place, changes in planned.changes.items():
        for change in changes:
            wanted = change.shape if place is None else place.shape_in_file(change.shape)
            if wanted != info.shape:
                raise ModelError(
                    f"{header.path}: {planned.source} is {list(info.shape)}, the LoRA changes a layer of "
                    f"{list(change.shape)}. It was made for another base model."
                )


def _header_bytes(header: WeightsHeader, plan: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for planned in plan:
        info = header.tensors[planned.source]
        end = position + info.num_bytes
        entries[planned.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8, as the format asks
    return len(encoded).to_bytes(8, "little") + encoded


def _copy(header: WeightsHeader, planned: PlannedTensor, file: IO[bytes], target: Path) -> None:
    """A function of its own, so that one tensor is let go before the next is read."""
    import torch

    [(_, tensor)] = read_tensors(header, [planned.source])
    for place, changes in planned.changes.items():
        add_changes(tensor if place is None else place.view_of(tensor), changes)
    if planned.changes:
        _require_finite(tensor, planned.name, target)
    if tensor.numel():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _require_finite(tensor: Tensor, name: str, target: Path) -> None:
    try:
        check_finite(tensor, name, target)
    except ModelError as error:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(
            f"{target}: was not written: with the LoRA added, {name} holds numbers too large for {dtype} (NaN or infinite). "
            "Lower --weight, or merge into a copy of the model in bf16 or fp32."
        ) from error
