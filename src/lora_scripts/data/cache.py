"""Encodings on disk, found by what shaped them: an edited picture, caption or setting simply has another name.

An entry is one safetensors file, written to a temporary name and renamed. A damaged entry counts as absent. Deleting the
folder costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.config import RunConfig

__all__ = ["EncodingCache", "cache_folder", "cache_key"]

FORMAT = 1


def cache_folder(config: RunConfig) -> Path:
    """`.cache` beside the data, so that all runs on them share it; in the output folder where that is read-only."""
    if config.cache_dir is not None:
        return config.cache_dir
    folder = config.data_dir.parent if config.data_dir.is_file() else config.data_dir
    if os.access(folder, os.W_OK):
        return folder / ".cache"
    return config.output_dir / "cache"


def cache_key(fingerprint: str, **shaped_by: object) -> str:
    """A name for the encoding that follows from an encoder's fingerprint and all that shaped its input."""
    text = json.dumps({"format": FORMAT, "encoder": fingerprint, **shaped_by}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class EncodingCache:
    """Dictionaries of tensors by key; with `folder` None nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """The stored tensors, or None when there are none or they are damaged."""
        if self.folder is None:
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            raw = self._path(kind, key).read_bytes()
            body, digest = raw[:-32], raw[-32:]
            if hashlib.sha256(body).digest() != digest:
                return None
            return load(body)
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def put(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Stores the tensors; a full or read-only disk costs the entry, not the run."""
        if self.folder is None:
            return
        from safetensors.torch import save

        path = self._path(kind, key)
        body = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(body + hashlib.sha256(body).digest())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()

    def _path(self, kind: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / key[:2] / f"{key}.safetensors"
