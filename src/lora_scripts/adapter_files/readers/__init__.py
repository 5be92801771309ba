"""The programs that load LoRA files for pictures, and what each does with a given one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.adapter_files.readers.a1111 import Automatic1111
from lora_scripts.adapter_files.readers.comfyui import ComfyUI
from lora_scripts.adapter_files.readers.diffusers import Diffusers
from lora_scripts.adapter_files.readers.forge import Forge
from lora_scripts.adapter_files.readers.invokeai import InvokeAI
from lora_scripts.adapter_files.readers.verdict import Reader, Verdict
from lora_scripts.adapter_files.reference import ARCHITECTURES

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = ["READERS", "Reader", "Verdict", "verdicts"]

READERS: tuple[Reader, ...] = (Automatic1111(), Forge(), ComfyUI(), InvokeAI(), Diffusers())


def verdicts(file: AdapterFile) -> list[Verdict]:
    """What each program does with a file; empty for a model that the tables do not cover."""
    return [reader.takes(file) for reader in READERS] if file.architecture in ARCHITECTURES else []
