"""A safetensors file put together from tensors of other files, one of them in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.atomic_file import new_file

if TYPE_CHECKING:
    from lora_scripts.models.weights_file import WeightsHeader

__all__ = ["CopiedTensor", "tensor_hash", "write_copies"]


@dataclass(frozen=True)
class CopiedTensor:
    """One tensor of the new file.

    Attributes:
        dtype: the format's name, "F16", ...
        shape: with as many elements as the source has; the bytes are the same.
        source: header of the file that has it, and its key there; None for `data`.
        data: the bytes themselves, of a tensor that no file has.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: tuple[WeightsHeader, str] | None = None
    data: bytes = b""

    @property
    def num_bytes(self) -> int:
        return len(self.data) if self.source is None else self.source[0].tensors[self.source[1]].num_bytes

    def read(self) -> memoryview:
        """Its bytes, checked to be finite numbers."""
        import torch

        from lora_scripts.models.weights_file import read_tensors

        if self.source is None:
            return memoryview(self.data)
        header, key = self.source
        [(_, tensor)] = read_tensors(header, [key])
        return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")


def write_copies(path: Path, tensors: Sequence[CopiedTensor], metadata: Mapping[str, str]) -> None:
    """Writes the file whole or not at all; the same tensors and texts give the same bytes.

    Raises:
        ModelError: a tensor holds numbers that are not finite.
        DataError: the disk is full, or the place cannot be written.
    """
    ordered = _ordered(tensors)
    head = _header_bytes(ordered, metadata)
    with new_file(path, len(head) + sum(tensor.num_bytes for tensor in ordered)) as file:
        file.write(head)
        for tensor in ordered:
            file.write(tensor.read())  # not kept in a variable, so that it is let go before the next is read


def tensor_hash(tensors: Sequence[CopiedTensor]) -> str:
    """SHA-256 of the new file's tensor part, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in _ordered(tensors):
        digest.update(tensor.read())
    return digest.hexdigest()


def _ordered(tensors: Sequence[CopiedTensor]) -> list[CopiedTensor]:
    """As the format's library orders them: wide numbers first, so that every tensor is aligned, then by name."""
    return sorted(tensors, key=lambda tensor: (-_width(tensor), tensor.name))


def _width(tensor: CopiedTensor) -> int:
    digits = "".join(letter for letter in tensor.dtype.split("_")[0] if letter.isdigit())
    return int(digits) if digits else 8


def _header_bytes(tensors: Sequence[CopiedTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8, as the format asks
    return len(encoded).to_bytes(8, "little") + encoded
