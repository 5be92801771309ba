"""What a LoRA on disk holds, as one digest: the same for a renamed or moved one, another for a changed one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["content_digest", "content_files"]


def content_files(path: Path) -> Iterator[Path]:
    """The files that decide what a LoRA does: its tensors, and for a folder the settings that hold its scales."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*.safetensors"))
        yield from sorted(file for file in path.rglob("adapter_config.json"))


def content_digest(files: Sequence[Path]) -> str:
    """SHA-256 over the files' own, in hexadecimal digits."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
