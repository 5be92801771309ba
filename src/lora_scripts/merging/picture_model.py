"""A picture model with adapters merged in: the same single file or diffusers folder, tensor for tensor, in the same dtypes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lora_scripts.atomic_folder import new_folder
from lora_scripts.errors import DataError, ExportError
from lora_scripts.lora_tools.finished import with_history
from lora_scripts.merging.stream import Change, PlannedTensor, write_merged_file
from lora_scripts.models.layer_files import LayerFiles
from lora_scripts.models.layout_names import Place
from lora_scripts.models.unet_layout import UNET_PREFIX
from lora_scripts.models.weights_file import WeightsHeader

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = ["Changes", "WeightedFiles", "changes_of", "running_average", "write_merged_checkpoint"]

WeightedFiles: TypeAlias = "Sequence[tuple[AdapterFile, float]]"
"""Adapter files with the strength that each is merged at."""
Changes: TypeAlias = Mapping[tuple[Path, str], Mapping[Place | None, Sequence[Change]]]
"""(weights file, tensor in it) to the changes that it gets, by the part of it that is the layer's weight."""

_AVERAGE = "model_ema."
_STALE_TEXTS = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_WEIGHTS_ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5")
_TEXT_ENDINGS = (".json", ".md", ".txt", "")


def changes_of(base: LayerFiles, adapters: WeightedFiles) -> Changes:
    """What each tensor of the base's files gets; nothing is read yet.

    Raises:
        ModelError: a file is damaged, or has layers that the base lacks.
    """
    changes: dict[tuple[Path, str], dict[Place | None, list[Change]]] = {}
    for adapter, strength in adapters:
        adapter.require_sound()
        base.require_layers(adapter.path, adapter.layers, adapter.title)
        for layer in adapter.layers:
            header, place = base.places[layer]
            change = Change(base.shapes[layer], partial(adapter.layer, layer), strength)
            changes.setdefault((header.path, place.name), {}).setdefault(place, []).append(change)
    return changes


def write_merged_checkpoint(base: LayerFiles, changes: Changes, output: Path, note: str) -> Path:
    """Writes the model with the changes added to its weights; it is there whole or not at all.

    Of several adapters each is added to what the base had, so that their order is of no account (a DoRA's or OFT's change
    depends on the weights it meets). A running average of the weights (EMA) is left out of a single file: it would bring
    the model without the LoRA back.

    Args:
        note: a line on what was merged, for the header of a single file.
    Raises:
        ModelError: a tensor is quantised or of another shape, or no longer finite in its dtype.
        ExportError: the disk is full, or the place cannot be written.
    """
    try:
        if base.path.is_file():
            [header] = base.headers
            write_merged_file(header, _plan(header, changes), output, _texts(header, output, note))
        else:
            with new_folder(output) as folder:
                _copy_others(base, folder)
                for header in base.headers:
                    target = folder / header.path.relative_to(base.path)
                    write_merged_file(header, _plan(header, changes), target)
    except DataError as error:
        raise ExportError(f"Merge failed: {error}") from error
    return output


def _plan(header: WeightsHeader, changes: Changes) -> list[PlannedTensor]:
    names = sorted(header.tensors, key=lambda name: header.tensors[name].begin)
    left_out = set(running_average(header))
    return [PlannedTensor(name, name, changes.get((header.path, name), {})) for name in names if name not in left_out]


def running_average(header: WeightsHeader) -> list[str]:
    """The tensors of a single file that are left out: the U-Net's running average, where the plain weights are there too."""
    if not any(name.startswith(UNET_PREFIX) for name in header.tensors):
        return []
    return [name for name in header.tensors if name.startswith(_AVERAGE)]


def _texts(header: WeightsHeader, output: Path, note: str) -> dict[str, str]:
    """The base's header texts without the hashes that are no longer true, with a line on what was merged."""
    texts = {key: value for key, value in header.metadata.items() if key not in _STALE_TEXTS}
    if "modelspec.title" in texts:
        texts["modelspec.title"] = output.stem
    return with_history(texts, note)


def _copy_others(base: LayerFiles, folder: Path) -> None:
    """Everything that belongs to the model and is not written anew: configurations, tokenizers, the VAE."""
    written = {header.path.parent for header in base.headers}
    for path in sorted(base.path.rglob("*")):
        inner = path.relative_to(base.path)
        if not path.is_file() or any(part.startswith(".") for part in inner.parts):
            continue
        if path.parent in written and path.name.endswith(_WEIGHTS_ENDINGS):
            continue  # another dtype's or library's copy of the weights that are changed
        if path.parent == base.path and path.suffix.lower() not in _TEXT_ENDINGS:
            continue  # a whole model in one file, which many folders hold beside their parts
        (folder / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / inner)
