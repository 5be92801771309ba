"""Reading safetensors files with nothing taken on trust: what a file is, whether it is whole, and its tensors one by one.

Every weights file of the program passes here: base models, LoRA files, caches. A pickle is recognised by its content and
never opened. The layout of a file: 8 bytes header length (little endian), the header as JSON, the tensors' bytes without gaps.

Source: the format's description in the huggingface/safetensors repository; the checks are stricter than that reader's.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_scripts.errors import ModelError
from lora_scripts.models.file_kinds import FILE_KINDS, looks_like

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch
    from torch import Tensor

__all__ = [
    "MAX_HEADER_BYTES",
    "TensorInfo",
    "WeightsHeader",
    "check_finite",
    "inspect_weights",
    "looks_like",
    "read_tensors",
]

MAX_HEADER_BYTES = 25_000_000
"""The largest real headers (thousands of LoRA tensors with a full tag list) stay below 2 MB."""

_BLOCK = 4096
"""Shortest run of zero bytes at the end of a file that is looked into: a block of the file system."""

_DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

_TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: the format's name, "F16", "BF16", "F32", ...
        begin, end: bytes, counted from the first byte after the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[self.dtype])
        return dtype


@dataclass(frozen=True)
class WeightsHeader:
    """What a whole and well-formed safetensors file holds, without its tensors' values.

    Attributes:
        data_start: position of the first tensor byte in the file.
        tensors: by name, in the order of the file's header.
        metadata: the header's free text entries.
    """

    path: Path
    data_start: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def inspect_weights(path: Path | str, *, allow_zero_tail: bool = False) -> WeightsHeader:
    """The header of a safetensors file that is whole: every offset checked, nothing missing, nothing left over.

    Args:
        allow_zero_tail: for files whose content is checked by a hash elsewhere and in which zeros may be right, such as an
            optimizer's state.
    Raises:
        ModelError: the file is missing, is something else, is cut off, or its header contradicts itself.
    """
    path = Path(path)
    try:
        kind = looks_like(path)
        if kind != "safetensors":
            what, way_on = FILE_KINDS[kind]
            raise ModelError(f"{path}: {what}. {way_on}")
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = _header_bytes(file, path, size)
            data_start = 8 + len(header_bytes)
            tensors, metadata = _parse_header(header_bytes, path)
            _check_layout(tensors, size - data_start, path)
            header = WeightsHeader(path, data_start, tensors, metadata)
            if not allow_zero_tail:
                _check_tail(file, header, size)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file.") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or type(error).__name__}).") from None
    return header


def _header_bytes(file: BinaryIO, path: Path, size: int) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{path}: its header claims {length / 1e6:.0f} MB, real ones stay far below {MAX_HEADER_BYTES / 1e6:.0f} MB. "
            "The file is damaged or was made to do harm: get it again from a source you trust."
        )
    if 8 + length > size:
        raise ModelError(
            f"{path}: half a download: the header alone needs {8 + length:,} bytes and the file has {size:,}. Download it again."
        )
    return file.read(length)


def _parse_header(header_bytes: bytes, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    def refuse(reason: str) -> ModelError:
        return ModelError(
            f"{path}: damaged header: {reason}. Download the file again, or save it anew where it was made."
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in pairs:
            if key in entries:
                raise refuse(f"the key {key!r} stands in it twice, so one of the two would be lost silently")
            entries[key] = value
        return entries

    try:
        header = json.loads(header_bytes.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise refuse(f"it is not valid JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise refuse("it is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("__metadata__ may hold only texts")

    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise refuse(f"the entry of {name!r} lacks dtype, shape or data_offsets") from None
        if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
            raise refuse(f"{name!r} has the unknown dtype {dtype!r}")
        if not isinstance(shape, list) or not all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            raise refuse(f"{name!r} has a shape or offset that is not a whole number from 0 on")
        if end - begin != prod(shape) * _DTYPE_BYTES[dtype]:
            raise refuse(
                f"{name!r} has {end - begin:,} bytes, but {dtype} {shape} needs {prod(shape) * _DTYPE_BYTES[dtype]:,}"
            )
        tensors[name] = TensorInfo(dtype, tuple(shape), begin, end)
    if not tensors:
        raise refuse("it lists no tensors")
    return tensors, metadata


def _check_layout(tensors: Mapping[str, TensorInfo], data_bytes: int, path: Path) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            how = "overlaps the one before it" if info.begin < position else "leaves a gap before it"
            raise ModelError(
                f"{path}: damaged header: {name!r} {how} (byte {info.begin:,}, expected {position:,}). Download it again."
            )
        position = info.end
    if position > data_bytes:
        raise ModelError(
            f"{path}: half a download: {position - data_bytes:,} of {position:,} bytes of weights are missing at the end. Download it again."
        )
    if position < data_bytes:
        raise ModelError(
            f"{path}: {data_bytes - position:,} bytes follow after the last tensor that belong to nothing. "
            "The file was glued together or written over a longer one: download it again."
        )


def _check_tail(file: BinaryIO, header: WeightsHeader, size: int) -> None:
    """Refuses a file whose end is zeros: downloaders that reserve the space first leave that when they are broken off.

    One whole tensor of zeros at the end is normal (the lora_B of an untrained LoRA), so is a zero bias. A run of zeros that
    starts inside a matrix, or that covers a matrix and more, is not.
    """
    zeros = _count_zeros_at_end(file, header.data_start, size)
    if zeros < _BLOCK:
        return
    start = size - zeros - header.data_start
    by_position = sorted(header.tensors.items(), key=lambda item: item[1].begin)
    covered = [(name, info) for name, info in by_position if info.begin >= start and info.num_bytes]
    cut = [(name, info) for name, info in by_position if info.begin < start < info.end]
    in_cut = sum(info.end - start for name, info in cut if len(info.shape) > 1)
    matrices = [name for name, info in covered if len(info.shape) > 1]
    if in_cut >= _BLOCK or (matrices and len(covered) > 1):
        first = cut[0][0] if in_cut >= _BLOCK else covered[0][0]
        raise ModelError(
            f"{header.path}: the last {zeros:,} bytes are all zero, from {first!r} on: a download that was broken off after its "
            "space had been reserved. Download it again."
        )


def _count_zeros_at_end(file: BinaryIO, lowest: int, size: int) -> int:
    end = size
    while end > lowest:
        begin = max(lowest, end - (1 << 16 if end == size else 1 << 22))
        file.seek(begin)
        chunk = file.read(end - begin)
        kept = len(chunk.rstrip(b"\0"))
        if kept:
            return size - begin - kept
        end = begin
    return size - lowest


def read_tensors(
    header: WeightsHeader,
    names: Iterable[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    finite: bool = True,
    images: torch.memory_format | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) one at a time in the order of the file, converted and checked to be finite.

    The bytes are read rather than mapped: a mapped file counts as the process's memory until the system takes it back, so
    that converting a 2 GB file would show 4 GB, and a file cut while it is mapped kills the process.

    Args:
        dtype: of floating-point tensors; None keeps the file's.
        shapes: other shapes with the same number of elements, by name ([out, in, 1, 1] as [out, in]).
        finite: False to look at a file that may be broken.
        images: how tensors of four dimensions lie in memory; None for the usual way.
    Raises:
        ModelError: a tensor is not finite, or becomes so in `dtype`; the file became shorter meanwhile.
    """
    import torch

    from lora_scripts.models.number_formats import converted

    with header.path.open("rb", buffering=0) as file:
        names = sorted(names, key=lambda name: header.tensors[name].begin)
        # Memory that was written to before is faster than new memory.
        scratch = torch.empty(0, dtype=torch.uint8)
        largest = max((header.tensors[name].num_bytes for name in names), default=0)
        for name in names:
            info = header.tensors[name]
            shape = shapes[name] if shapes and name in shapes else info.shape
            stays = dtype in (None, info.torch_dtype) and (images is None or len(shape) != 4)
            if not stays and info.num_bytes > len(scratch):
                scratch = torch.empty(largest, dtype=torch.uint8)
            raw = torch.empty(info.num_bytes, dtype=torch.uint8) if stays else scratch[: info.num_bytes]
            _read_fully(file, header.data_start + info.begin, raw, header.path)
            stored = raw.view(info.torch_dtype).reshape(shape)
            tensor = converted(stored, dtype, images)
            if tensor is stored and not stays:
                tensor = stored.clone()  # the scratch is written over
            if finite:
                check_finite(tensor, name, header.path, stored=stored)
            yield name, tensor.to(device)


def _read_fully(file: Any, position: int, into: Tensor, path: Path) -> None:
    view = into.numpy().data
    file.seek(position)
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + (1 << 30)])
        if not count:
            raise ModelError(f"{path}: became shorter while it was read. Is it still being downloaded?")
        done += count


def check_finite(tensor: Tensor, name: str, path: Path | str, *, stored: Tensor | None = None) -> None:
    """Does nothing when every value is finite. One pass, no copy: a NaN or infinity shows in the smallest or largest value.

    Args:
        stored: the tensor before its conversion, to tell damaged weights from a dtype that is too narrow.
    Raises:
        ModelError: names the tensor.
    """
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.to(torch.float32) if tensor.element_size() == 1 else tensor
    low, high = values.aminmax()
    if torch.isfinite(low) and torch.isfinite(high):
        return
    if stored is not None and stored.dtype != tensor.dtype and torch.isfinite(stored.float()).all():
        raise ModelError(
            f"{path}: {name} holds values that do not fit into {str(tensor.dtype).removeprefix('torch.')}. Use bf16 or fp32 instead."
        )
    bad = int((~torch.isfinite(values)).sum())
    raise ModelError(
        f"{path}: {name} holds {bad:,} values of {tensor.numel():,} that are NaN or infinite: the weights are broken. "
        "Use another copy of the model; a merge or a training that failed leaves such files."
    )
