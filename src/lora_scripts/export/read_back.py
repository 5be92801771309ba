"""What a finished LoRA file holds, read without the code that wrote it, and compared with what was trained.

The header is parsed by hand here, and each format spells its names on its own (`verify.py`, `verify_peft.py`), so that a
mistake in a writer cannot hide behind the same mistake in its check.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.adapters.weights import LoRATensors, LoRAWeights

__all__ = ["Stored", "StoredLayer", "Verification", "check_keys", "compare_stored", "read_tensors_by_hand"]

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_WIDTH = {"F16": 2, "BF16": 2, "F32": 4}
MOST_LOST = 0.05
"""Largest share of the trained change that may be lost to numbers too small for the file's dtype."""


@dataclass(frozen=True)
class StoredLayer:
    """One layer as a file holds it, in float32.

    Attributes:
        lora_A: [R, in] or [R, in, k, k].
        lora_B: [out, R] or [out, R, 1, 1].
        names: what the file calls lora_A, lora_B and alpha, for messages.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    names: tuple[str, str, str]

    @property
    def scale(self) -> float:
        return self.alpha / self.lora_A.shape[0]


@dataclass(frozen=True)
class Stored:
    """A finished file or folder.

    Attributes:
        layers: by the model's own names, component in front.
        num_tensors: all that the file holds.
        dtype: of the matrices, by safetensors' name: "F16", "BF16", "F32".
        header_bytes: length of the header.
        metadata: the header's texts.
    """

    path: Path
    layers: Mapping[str, StoredLayer]
    num_tensors: int
    dtype: str
    header_bytes: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """What was found in a finished file.

    Attributes:
        num_tensors: all of them matched a trained layer.
        relative_error: size of the difference between the file's and the trained weight changes, over the latter's size.
        num_zero_layers: layers whose change is exactly zero in the file.
        header_bytes: length of the header.
    """

    path: Path
    num_layers: int
    num_tensors: int
    num_parameters: int
    dtype: str
    relative_error: float
    num_zero_layers: int
    header_bytes: int
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        return self.told("the trained weights")

    def told(self, expected: str) -> str:
        """A line on what was found; `expected` says in words what the file was compared with."""
        return (
            f"{self.path.name}: read back, {self.num_tensors} of {self.num_tensors} tensors in {self.num_layers} layers "
            f"matched, all finite, difference from {expected} {self.relative_error:.1e} ({self.dtype})"
        )


def compare_stored(stored: Stored, expected: LoRAWeights) -> Verification:
    """Compares the layers of a finished file, which must be the trained ones by name, with what was trained.

    Raises:
        ExportError: a tensor is of another shape or not finite; alpha differs; a weight change is further from the trained
            one than the file's dtype explains; every change is zero. The text says "failed" and what to do.
    """
    import torch

    path, dtype = stored.path, stored.dtype
    error = size = floor = 0.0
    num_zero = 0
    info = torch.finfo(getattr(torch, _DTYPES[dtype]))
    for layer, trained in expected.items():
        found = stored.layers[layer]
        _check_layer(path, found, trained)
        layer_error, layer_size, file_size = _compare(trained, found)
        error += layer_error
        size += layer_size
        # Numbers near the smallest that the dtype holds are off by half of that, whatever their own size; a small share
        # lost so harms nobody, a larger one is training thrown away.
        smallest = trained.scale * info.smallest_normal * info.eps / 2
        floor += found.lora_B.numel() * float((smallest * trained.lora_A.norm()) ** 2)
        num_zero += file_size == 0.0
    if num_zero == len(expected):
        raise ExportError(
            f"{path}: failed: the LoRA changes nothing, every one of its {len(expected)} layers is zero. "
            "Train longer or with a higher learning_rate; with fp16, numbers under 6e-8 become zero: set save_precision to fp32."
        )
    relative = (error / size) ** 0.5 if size else float("inf")
    # A tensor is off by half a unit in its last place at most; both factors together, with some room.
    tolerance = max(16 * info.eps / 2, 2e-6)
    if relative > MOST_LOST or error**0.5 > tolerance * size**0.5 + floor**0.5:
        raise ExportError(
            f"{path}: failed: the weight changes in the file differ from the trained ones by {relative:.1e} of their size, "
            f"rounding to {dtype} explains {tolerance:.1e}. Set save_precision to fp32 and export again."
        )
    return Verification(
        path,
        len(expected),
        stored.num_tensors,
        sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in stored.layers.values()),
        dtype,
        relative,
        num_zero,
        stored.header_bytes,
        stored.metadata,
    )


def read_tensors_by_hand(path: Path) -> tuple[dict[str, Tensor], dict[str, str], int, str]:
    """Tensors as float32, header texts, header length and the dtype of the matrices, parsed byte by byte.

    Raises:
        ExportError: the file is not there, or is no safetensors file of floating-point numbers.
    """
    import torch

    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        body = bytearray(data[8 + length :])
        tensors: dict[str, Tensor] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            kind = getattr(torch, _DTYPES[entry["dtype"]])
            count = (end - begin) // _WIDTH[entry["dtype"]]
            if end > len(body):
                raise ValueError(f"{name} lies behind the end of the file")
            flat = torch.frombuffer(body, dtype=kind, count=count, offset=begin)
            tensors[name] = flat.reshape(entry["shape"]).float()
        matrices = [entry["dtype"] for entry in header.values() if len(entry["shape"]) > 1]
        return tensors, metadata, length, matrices[0]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise ExportError(
            f"{path}: failed: the finished file cannot be read back ({error}). Check the disk and export again."
        ) from error


def check_keys(path: Path, found: Collection[str], wanted: Collection[str]) -> None:
    """Does nothing when the file holds the wanted keys and no others.

    Raises:
        ExportError: names one that is missing or unknown.
    """
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing:
        raise ExportError(f"{path}: failed: {len(missing)} of {len(wanted)} keys are missing, {missing[0]} among them.")
    if unknown:
        raise ExportError(f"{path}: failed: {len(unknown)} keys belong to no trained layer, {unknown[0]} among them.")


def _check_layer(path: Path, found: StoredLayer, trained: LoRATensors) -> None:
    import torch

    matrices = ((found.lora_A, trained.lora_A), (found.lora_B, trained.lora_B))
    for name, (tensor, wanted) in zip(found.names[:2], matrices, strict=True):
        if tensor.shape != wanted.shape:
            raise ExportError(
                f"{path}: failed: {name} is {list(tensor.shape)} in the file, {list(wanted.shape)} was trained."
            )
    for name, tensor in zip(found.names, (found.lora_A, found.lora_B, torch.tensor(found.alpha)), strict=True):
        if not torch.isfinite(tensor).all():
            raise ExportError(
                f"{path}: failed: {name} holds numbers that are not finite. Do not use this file; export an "
                "earlier checkpoint, or set save_precision to fp32."
            )
    if abs(found.alpha - trained.alpha) > 1e-6 * abs(trained.alpha):
        raise ExportError(
            f"{path}: failed: {found.names[2]} is {found.alpha:g} in the file, {trained.alpha:g} was trained."
        )


def _compare(trained: LoRATensors, found: StoredLayer) -> tuple[float, float, float]:
    """Squared Frobenius sizes of: file's change minus trained change, trained change, file's change.

    Computed on R x R products, never the full [out, in] change: |BA|^2 = sum((B'B) * (AA')).
    """
    import torch

    a, b = trained.lora_A.detach().cpu().double().flatten(1), trained.lora_B.detach().cpu().double().flatten(1)
    c, d = found.lora_A.double().flatten(1), found.lora_B.double().flatten(1)
    b, d = b * trained.scale, d * found.scale
    # B A - D C = (B - D) A + D (A - C); written so that equal numbers give exactly zero instead of a cancelled sum.
    left, right = torch.cat([d - b, d], dim=1), torch.cat([a, c - a], dim=0)
    return _squared(left, right), _squared(b, a), _squared(d, c)


def _squared(left: Tensor, right: Tensor) -> float:
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
