"""An adapter file for a loaded model: of any kind, but whole and for this model, or refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.adapter_files.adapter_file import open_adapter_file
from lora_scripts.errors import ModelError
from lora_scripts.export.reader import unmatched_text

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = ["open_for_model"]


def open_for_model(path: Path, layers: Mapping[str, tuple[int, ...]]) -> AdapterFile:
    """The file with its layers under the model's names; its tensors are unread.

    Args:
        layers: every layer of the model with the shape of its weight, as `layer_shapes` gives them.
    Raises:
        ModelError: no adapter, damaged, or with layers that the model lacks. Shapes are compared as layers are read.
    """
    file = open_adapter_file(path, layers)
    unmatched = [layer.file_name for layer in file.layers.values() if not layer.known]
    if unmatched:
        raise ModelError(unmatched_text(file, unmatched, layers))
    file.require_sound()
    return file
