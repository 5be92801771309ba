"""Reading safetensors files with nothing taken on trust: what a file is, whether it is whole, and its tensors one by one.

Every weights file of the program passes here: base models, LoRA files, caches. A pickle is recognised by its content and
never opened. The layout of a file: 8 bytes header length (little endian), the header as JSON, the tensors' bytes without gaps.

Source: the format's description in the huggingface/safetensors repository; the checks are stricter than that reader's.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_scripts.errors import ModelError

if TYPE_CHECKING:
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


_STARTS = (
    (b"version https://git-lfs", "git-lfs pointer"),
    (b"GGUF", "gguf"),
    (b"\x89PNG\r\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"),
    (b"BM", "image"),
    (b"II*\x00", "image"),
    (b"MM\x00*", "image"),
    (b"\x89HDF\r\n", "hdf5"),
    (b"7z\xbc\xaf\x27\x1c", "archive"),
    (b"Rar!\x1a\x07", "archive"),
    (b"\x1f\x8b", "archive"),
    (b"%PDF-", "pdf"),
    (b"(dp", "pickle"),
    (b"(lp", "pickle"),
    (b"c__builtin__", "pickle"),
    (b"ccopy_reg", "pickle"),
    (b"cposix", "pickle"),
    (b"cos\n", "pickle"),
)

_WHAT = {
    "empty": ("the file is empty", "Download it again; the last attempt was broken off or the disk was full."),
    "html": (
        "this is a web page, not weights",
        "A download that needed a login or a click leaves one behind. Open the link in a browser and download the file itself.",
    ),
    "git-lfs pointer": (
        "this is a git-lfs pointer, a few lines of text in place of the weights",
        "Run `git lfs pull` in that repository, or download the file itself.",
    ),
    "pickle": (
        "this is a pickle (.ckpt, .pt or .bin weights), which can run any program when it is opened, so it is never loaded",
        "Use the .safetensors version of the model, or convert it in a place you trust (the WebUI's checkpoint merger writes "
        "safetensors), then give the new file.",
    ),
    "gguf": (
        "this is a GGUF file, quantised for inference, which cannot be trained",
        "Use the original .safetensors file or folder of the model.",
    ),
    "image": ("this is a picture, not weights", "Give the path of the model's .safetensors file."),
    "archive": ("this is a packed archive", "Unpack it, then give the .safetensors file that was inside."),
    "hdf5": ("this is an HDF5 file of another framework", "Use the .safetensors version of the model."),
    "pdf": ("this is a PDF document, not weights", "Give the path of the model's .safetensors file."),
    "json": ("this is a JSON text, not weights", "Give the .safetensors file, or the folder that holds it."),
    "text": ("this is a text file, not weights", "Give the path of the model's .safetensors file."),
    "unknown": (
        "this is not a safetensors file",
        "Use a model in safetensors format. If the name says it is one, the file is damaged: download it again.",
    ),
}


def looks_like(path: Path | str) -> str:
    """What a file is, judged by its first bytes and never by its name.

    Returns:
        "safetensors", or one of "empty", "html", "git-lfs pointer", "pickle", "gguf", "image", "archive", "hdf5", "pdf",
        "json", "text", "unknown". "safetensors" means the file starts like one, not that it is whole.
    """
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        return "empty"
    # A header length below the cap followed by "{" is safetensors; a larger one is left to `inspect_weights` to refuse.
    if len(head) >= 9 and head[8:9] == b"{" and head[4:8] == b"\0\0\0\0":
        return "safetensors"
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image"
    if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:
        return "pickle"
    if head.startswith(b"PK\x03\x04"):
        return "pickle" if _zip_holds_pickle(Path(path), head) else "archive"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<script")):
        return "html"
    if text.startswith((b"{", b"[")):
        return "json"
    return "unknown" if any(byte < 9 for byte in head) or len(head) < 16 else _text_or_unknown(head)


def _text_or_unknown(head: bytes) -> str:
    try:
        head[:-4].decode("utf-8")
    except UnicodeDecodeError:
        return "unknown"
    return "text"


def _zip_holds_pickle(path: Path, head: bytes) -> bool:
    """Whether a zip is one that torch wrote; only its list of names is read, nothing is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        # A half download has no list at its end; torch puts the pickle first, so its name is in the first bytes.
        return b".pkl" in head


def inspect_weights(path: Path | str) -> WeightsHeader:
    """The header of a safetensors file that is whole: every offset checked, nothing missing, nothing left over.

    Raises:
        ModelError: the file is missing, is something else, is cut off, or its header contradicts itself.
    """
    path = Path(path)
    try:
        kind = looks_like(path)
        if kind != "safetensors":
            what, way_on = _WHAT[kind]
            raise ModelError(f"{path}: {what}. {way_on}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = _header_bytes(file, path, size)
            data_start = 8 + len(header_bytes)
            tensors, metadata = _parse_header(header_bytes, path)
            _check_layout(tensors, size - data_start, path)
            header = WeightsHeader(path, data_start, tensors, metadata)
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
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) one at a time in the order of the file, converted and checked to be finite.

    The bytes are read rather than mapped: a mapped file counts as the process's memory until the system takes it back, so
    that converting a 2 GB file would show 4 GB, and a file cut while it is mapped kills the process.

    Args:
        dtype: of floating-point tensors; None keeps the file's.
        shapes: other shapes with the same number of elements, by name ([out, in, 1, 1] as [out, in]).
    Raises:
        ModelError: a tensor is not finite, or becomes so in `dtype`; the file became shorter meanwhile.
    """
    import torch

    with open(header.path, "rb", buffering=0) as file:
        for name in sorted(names, key=lambda name: header.tensors[name].begin):
            info = header.tensors[name]
            raw = torch.empty(info.num_bytes, dtype=torch.uint8)
            if info.num_bytes:
                _read_fully(file, header.data_start + info.begin, raw, header.path)
            stored = raw.view(getattr(torch, _TORCH_DTYPES[info.dtype]))
            tensor = stored.to(dtype) if dtype is not None and stored.is_floating_point() else stored
            check_finite(tensor, name, header.path, stored=stored)
            yield name, tensor.reshape(shapes[name] if shapes and name in shapes else info.shape).to(device)


def _read_fully(file: Any, position: int, into: Tensor, path: Path) -> None:
    view = memoryview(into.numpy()).cast("B")
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
