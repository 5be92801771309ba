"""An adapter file of any kind written anew as a plain LoRA, for the commands that bake."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.lora_tools.ranks import RankChoice

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile
    from lora_scripts.lora_tools.ranks import Losses

__all__ = ["BY_DEFAULT", "Baked", "write_baked"]

BY_DEFAULT = RankChoice(keep=0.9975, most=128)
"""What is left out is then at most 5 % as long as the change, wherever rank 128 is enough for that."""


@dataclass(frozen=True)
class Baked:
    """What was done.

    Attributes:
        file: what went in.
        losses: what the chosen ranks leave out.
        proof: a line on what reading the new file back has shown.
    """

    file: AdapterFile
    losses: Losses
    proof: str

    @property
    def kinds(self) -> str:
        """The kinds of the layers that went in, in words."""
        from lora_scripts.adapter_files.endings import KINDS

        return ", ".join(KINDS[kind] for kind in self.file.kinds)


def write_baked(
    lora: Path, output: Path, choice: RankChoice, base_model: str | None = None, precision: str | None = None
) -> Baked:
    """Writes the kohya file and reads it back.

    Args:
        base_model: the model that it was trained on, as `base_model` in a config; a DoRA or OFT needs it.
        precision: "fp16", "bf16" or "fp32"; None for the file's own.
    Raises:
        ConfigError: the base model is needed and not given.
        ModelError: the file is damaged, of a kind that is not read, or not for this base model.
        ExportError: the place cannot be written, or what came out changes nothing.
    """
    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.lora_tools.bake import bake_file
    from lora_scripts.lora_tools.finished import file_dtype, kohya_names_of, reworked_texts, write_finished

    base = None
    if base_model is not None:
        from lora_scripts.models.layer_files import open_layer_files
        from lora_scripts.models.source import resolve_base_model

        base = open_layer_files(resolve_base_model(base_model, task="text-to-image"))
    file = open_adapter_file(lora, base.shapes if base else None)
    if base is not None:
        base.require_layers(file.path, file.layers, file.title)
    names = base.kohya_names if base is not None else kohya_names_of([file])
    dtype = file_dtype(file, precision)
    weights, losses = bake_file(file, choice, dtype, base.weight if base else None)
    baked = Baked(file, losses, "")
    line = f"baked from {file.path.name} ({baked.kinds}) into a plain LoRA of rank {losses.ranks}: {losses}"
    texts = reworked_texts(file.metadata, output, weights, line)
    texts["ss_network_args"] = "{}"
    return Baked(file, losses, write_finished(output, weights, names, texts, dtype))
