"""LoRAs beneath the one that trains: found and named before the model is loaded; `folding` puts them into its weights.

Everything after that sees one base model: encoded captions, previews, the proof of the finished file. What training writes is
its own change alone, to be used together with the LoRAs beneath it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ConfigError
from lora_scripts.lora_content import content_digest, content_files

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig
    from lora_scripts.models.source import BaseModel

__all__ = ["LoRABeneath", "find_base_loras", "named", "with_base_loras"]


@dataclass(frozen=True)
class LoRABeneath:
    """One entry of `base_loras`.

    Attributes:
        entry: its place in the list, from 1.
        digest: SHA-256 of its content, in hexadecimal digits.
    """

    entry: int
    path: Path
    weight: float
    digest: str

    @property
    def name(self) -> str:
        """The name it goes by in `<lora:NAME:1>`."""
        return self.path.stem if self.path.suffix == ".safetensors" else self.path.name

    @property
    def tag(self) -> str:
        """As prompts of the WebUI ask for it."""
        return f"<lora:{self.name}:{self.weight:g}>"

    def __str__(self) -> str:
        return f"{self.name} at {self.weight:g}"


def find_base_loras(config: RunConfig) -> list[LoRABeneath]:
    """The entries of `base_loras` with what their files hold, in the order given; no tensor is kept.

    Raises:
        ConfigError: files are missing or named twice; all of them at once.
    """
    found: list[LoRABeneath] = []
    faults = []
    for entry, lora in enumerate(config.base_loras, 1):
        files = list(content_files(lora.path))
        twice = next((other for other in found if other.path.resolve() == lora.path.resolve()), None)
        if not files:
            what = "no LoRA in this folder" if lora.path.is_dir() else "no such LoRA file or folder"
            faults.append(f"base_loras: entry {entry}: {lora.path}: {what}. Check the path.")
        elif twice is not None:
            faults.append(
                f"base_loras: entry {entry}: {lora.path} is entry {twice.entry} already. Give it one weight, "
                f"{twice.weight + lora.weight:g} for both together."
            )
        else:
            found.append(LoRABeneath(entry, lora.path, lora.weight, content_digest(files)))
    if faults:
        raise ConfigError(faults)
    return found


def with_base_loras(source: BaseModel, loras: Sequence[LoRABeneath]) -> BaseModel:
    """The same model, known by another fingerprint: what was encoded without these LoRAs does not fit it."""
    if not loras:
        return source
    text = "\n".join(sorted(f"{lora.digest} {lora.weight!r}" for lora in loras))
    return replace(source, fingerprint=f"{source.fingerprint}+{hashlib.sha256(text.encode()).hexdigest()[:32]}")


def named(loras: Sequence[LoRABeneath]) -> str:
    """`warm at 0.7 and ink at 1`."""
    *first, last = [str(lora) for lora in loras]
    return f"{', '.join(first)} and {last}" if first else last
