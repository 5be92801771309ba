"""`lora-scripts merge` into a model that makes pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_scripts.adapter_files.adapter_file import open_adapter_file
from lora_scripts.adapter_files.endings import KINDS
from lora_scripts.atomic_file import require_new_file
from lora_scripts.atomic_folder import require_free
from lora_scripts.errors import ConfigError, DataError
from lora_scripts.merging.picture_check import check_merged_files
from lora_scripts.merging.picture_model import changes_of, running_average, write_merged_checkpoint
from lora_scripts.models.layer_files import open_layer_files

if TYPE_CHECKING:
    import argparse

    from lora_scripts.models.source import BaseModel

__all__ = ["merge_into_picture_model"]


def merge_into_picture_model(source: BaseModel, arguments: argparse.Namespace, strengths: Sequence[float]) -> int:
    """Writes the single file or diffusers folder with the adapters in its weights and compares; the exit code."""
    if source.path.is_file():
        require_new_file(arguments.output, [source.path, *arguments.lora], force=arguments.force)
    else:
        try:
            require_free(arguments.output)
        except DataError as error:
            raise ConfigError(f"--output {error}") from error
    base = open_layer_files(source)
    files = [open_adapter_file(path, base.shapes) for path in arguments.lora]
    changes = changes_of(base, list(zip(files, strengths, strict=True)))
    for file, strength in zip(files, strengths, strict=True):
        kinds = ", ".join(KINDS[kind] for kind in file.kinds)
        print(f"{file.path}: {kinds}, {len(file.layers)} layers, weight {strength:g}")
    note = "merged into the weights: " + ", ".join(
        f"{file.name} at {strength:g}" for file, strength in zip(files, strengths, strict=True)
    )
    write_merged_checkpoint(base, changes, arguments.output, note)
    print(f"{arguments.output}: written, {source.title} with {note.removeprefix('merged into the weights: ')}")
    if any(running_average(header) for header in base.headers):
        print("The running average (EMA) in the base was left out: it would bring the model without the LoRA back.")
    if not arguments.no_check:
        print(f"{arguments.output}: {check_merged_files(base.headers, changes, base.path, arguments.output)}")
    return 0
