"""A LoRA file put on the disk whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.atomic import write_atomically
from lora_scripts.errors import DataError, ExportError
from lora_scripts.export.kohya import to_kohya
from lora_scripts.export.metadata import MAX_HEADER_BYTES, fit_metadata, metadata_bytes, with_hashes
from lora_scripts.export.names import FileNames

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.adapters.weights import LayerChanges

__all__ = ["require_finite", "safetensors_bytes", "write_lora"]


_LEAST_TEXTS_BYTES = 64_000
"""Room for the texts also where the tensors' own entries fill the header: SDXL's 700 layers take 330 KB by themselves."""


def write_lora(
    path: str | Path,
    weights: LayerChanges,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    names: FileNames | None = None,
    *,
    own_kind: bool = False,
) -> dict[str, str]:
    """Writes a kohya LoRA file and returns the header texts that it got, hashes among them.

    The same weights and texts give the same bytes. An older file of that name is replaced in one step; a symbolic link
    is refused.

    Args:
        names: what each layer is called in the file (`PictureFamily.file_names`); None for the names of Stable Diffusion 1
            and 2.
        own_kind: also other kinds than plain LoRA, in their own tensors.
    Raises:
        ExportError: a number is not finite, or not in `dtype`; the place cannot be written. Nothing was written.
    """
    path = Path(path)
    require_finite(path, weights, dtype)
    tensors = to_kohya(weights, names, dtype, own_kind=own_kind)
    texts = with_hashes(tensors, metadata)
    room = max(MAX_HEADER_BYTES - _entries_bytes(tensors), _LEAST_TEXTS_BYTES)
    if metadata_bytes(texts) > room:
        # The hashes are 200 bytes and stay; the older one covers the texts, so it is taken again after shortening.
        texts = with_hashes(tensors, fit_metadata(metadata, room - 400))
    try:
        write_atomically(path, safetensors_bytes(tensors, texts))
    except DataError as error:
        raise ExportError(f"Export failed: {error}") from error
    return texts


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with its header texts in alphabetical order.

    The library writes them in an order that changes with each call, so equal files would not be equal byte for byte.
    """
    from safetensors.torch import save

    data = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    texts = header.pop("__metadata__", {})
    ordered = {"__metadata__": dict(sorted(texts.items())), **header}
    encoded = json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8, as the format asks
    return len(encoded).to_bytes(8, "little") + encoded + data[end:]


def _entries_bytes(tensors: Mapping[str, Tensor]) -> int:
    """An upper bound of what the tensors' own entries take in the header."""
    return sum(len(name) + len(str(tuple(tensor.shape))) + 80 for name, tensor in tensors.items())


_OWN_WORDS = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "dora_scale": "magnitude"}


def require_finite(path: Path, weights: LayerChanges, dtype: torch.dtype) -> None:
    """Does nothing when every number is finite, also in `dtype`.

    Raises:
        ExportError: names the layer; `path` was not written.
    """
    import torch

    for layer, change in weights.items():
        for part, tensor in change.parts().items():
            name = _OWN_WORDS.get(part, part)
            if not torch.isfinite(tensor).all():
                raise ExportError(
                    f"Export failed, {path} was not written: {name} of {layer} holds numbers that are not finite. "
                    "The training has diverged: go back to an earlier checkpoint, and use a lower learning_rate."
                )
            if name != "alpha" and not torch.isfinite(tensor.detach().to(dtype)).all():
                kind = str(dtype).removeprefix("torch.")
                raise ExportError(
                    f"Export failed, {path} was not written: {name} of {layer} holds numbers too large for {kind}. "
                    "Set save_precision to bf16 or fp32."
                )
