"""The strict door for LoRA files: plain LoRA that fits a given model whole, or a refusal with the reason.

What is not plain LoRA (LoHa, LoKr, DoRA, ...), what was made for another architecture and what is damaged is refused: a file
read half would give a picture that nobody can explain. `adapter_files` opens anything and tells what it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.adapter_files.owners import Spelling
from lora_scripts.adapters.weights import LayerChanges, LoRATensors, LoRAWeights
from lora_scripts.errors import ModelError
from lora_scripts.export.names import LANGUAGE_MODEL, split_layer
from lora_scripts.export.peft_config import folder_config, header_configs

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile, AdapterLayer

__all__ = ["AdapterChanges", "LoRAFile", "read_changes", "read_lora_file", "unmatched_text"]

_KINDS = {
    "dora": "a DoRA",
    "tucker": "a Tucker-decomposed LoCon",
    "loha": "a LoHa",
    "lokr": "a LoKr",
    "oft": "an OFT",
    "full": "a full difference of weights",
    "glora": "a GLoRA",
    "ia3": "an (IA)^3",
    "norm": "a LyCORIS that changes norm layers",
}
_CAN_BE_BAKED = ("dora", "tucker", "loha", "lokr", "oft", "full")
_SHOWN = 5


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA read from disk.

    Attributes:
        path: the file, or the folder it lies in.
        format: the spelling it was found in.
        weights: layers by the model's own names; tensors in the file's dtype, on the CPU.
        metadata: the file's header texts.
    """

    path: Path
    format: Spelling
    weights: LoRAWeights
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name it goes by in `<lora:NAME:1>`."""
        return self.path.stem if self.path.suffix == ".safetensors" else self.path.name

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({lora.rank for lora in self.weights.values()}))


@dataclass(frozen=True)
class AdapterChanges:
    """An adapter of any kind read from disk; as `LoRAFile`."""

    path: Path
    weights: LayerChanges
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_changes(path: str | Path, layer_names: Iterable[str]) -> AdapterChanges:
    """As `read_lora_file`, but of any kind that can be put to work: DoRA, LoHa, LoKr, OFT, whole differences too.

    Raises:
        ModelError: no adapter, a kind that is not read, layers that the model lacks, other shapes, damaged tensors.
    """
    from lora_scripts.adapter_files.adapter_file import open_adapter_file

    layers = layer_names if isinstance(layer_names, Mapping) else list(layer_names)
    file = open_adapter_file(path, layers)
    if all(layer.kind in ("lora", "unknown") or layer.kind not in _CAN_BE_BAKED for layer in file.layers.values()):
        plain = read_lora_file(path, layers)
        return AdapterChanges(plain.path, plain.weights, plain.metadata)
    _require_known(file, layers)
    return AdapterChanges(file.path, {name: file.layer(name) for name in file.layers}, file.metadata)


def read_lora_file(path: str | Path, layer_names: Iterable[str] | None = None) -> LoRAFile:
    """A LoRA in kohya, diffusers or PEFT spelling, with its layers under the model's own names.

    Args:
        path: a `.safetensors` file, a PEFT folder (also one with `unet/` and `text_encoder/` in it), or a folder
            that holds a single `.safetensors` file.
        layer_names: all layer names of the loaded model, component in front. A mapping to weight shapes, as
            `layer_shapes` gives, checks the shapes as well and fits 1x1 convolutions to linear layers. Without it
            the names are those of the published models; where none fits, kohya's underscores stay as they are.
    Returns:
        alpha is the file's; where the file has none it equals the rank (scale 1), which is how all readers take it.
    Raises:
        ModelError: not a LoRA, another kind of adapter, layers that the model lacks, other shapes, damaged tensors.
    """
    from lora_scripts.adapter_files.adapter_file import open_adapter_file

    layers = layer_names if layer_names is None or isinstance(layer_names, Mapping) else list(layer_names)
    file = open_adapter_file(path, layers)
    _require_plain(file)
    _require_known(file, layers)
    weights: dict[str, LoRATensors] = {}
    for name in file.layers:
        change = file.layer(name)
        assert isinstance(change, LoRATensors), name
        weights[name] = change
    return LoRAFile(file.path, file.spelling, weights, file.metadata)


def _require_known(file: AdapterFile, layers: Iterable[str] | None) -> None:
    """Raises ModelError for layers that the model lacks, keys that belong to none, and damaged tensors."""
    unmatched = list(file.strangers)
    if layers is not None:
        unmatched += [layer.file_name for layer in file.layers.values() if not layer.known]
    if unmatched:
        raise ModelError(unmatched_text(file, unmatched, layers or ()))
    file.require_sound()


def _require_plain(file: AdapterFile) -> None:
    """Raises ModelError for every kind of adapter but plain LoRA, and for settings that describe one."""
    other = next((layer for layer in file.layers.values() if layer.kind not in ("lora", "unknown")), None)
    if other is not None:
        way_on = "turn it into one first: lora-scripts bake" if other.kind in _CAN_BE_BAKED else "use another file"
        raise ModelError(
            f"{other.header.path}: is {_KINDS[other.kind]} ({_telling_key(other)}), which cannot be read here. "
            f"Only plain LoRA can; {way_on}."
        )
    for header in file.headers():
        if file.spelling == "peft":
            folder_config(header.path)
        elif file.spelling == "diffusers":
            header_configs(header.path, header.metadata)


def _telling_key(layer: AdapterLayer) -> str:
    """The key that shows the kind: for a DoRA not one of those that a LoRA has too."""
    plain = ("lora_down.weight", "lora_up.weight", "alpha")
    return next((key for part, key in layer.parts.items() if part not in plain), layer.file_name)


def unmatched_text(file: AdapterFile, unmatched: list[str], layers: Iterable[str]) -> str:
    """That these layers of a file are not in a model, and what the file looks like it was made for.

    Args:
        unmatched: as they stand in the file.
        layers: the model's, component in front.
    """
    shown = ", ".join(unmatched[:_SHOWN])
    more = f" and {len(unmatched) - _SHOWN} more" if len(unmatched) > _SHOWN else ""
    count = len(file.layers) + len(file.strangers)
    return (
        f"{file.path}: {len(unmatched)} of {count} layers are not in this model: {shown}{more}. "
        f"{_reason(unmatched, layers)}"
    )


def _reason(unmatched: list[str], layers: Iterable[str]) -> str:
    from lora_scripts.adapter_files.architectures import TITLES, architecture_by_names

    text = "\n".join(unmatched)
    if any(split_layer(layer)[0] == LANGUAGE_MODEL for layer in layers):
        if any(mark in text for mark in ("lora_unet_", "lora_te", "unet.", "transformer_blocks")):
            return "It looks like a LoRA for a picture model; this base model is a language model."
        return "It was made for another language model, or trains layers of a kind that is not supported."
    if any(mark in text for mark in ("lora_te2_", "input_blocks", "output_blocks", "middle_block_", "text_encoder_2.")):
        return "It looks like a LoRA for SDXL, which does not fit this base model."
    architecture = architecture_by_names(unmatched)
    if architecture is not None:
        return f"It looks like a LoRA for {TITLES[architecture]}, which does not fit this base model."
    return "It was made for another base model, or trains layers of a kind that is not supported."
