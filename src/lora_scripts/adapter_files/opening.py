"""From the headers of an adapter's files to its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.adapter_files.adapter_file import AdapterFile, AdapterLayer
from lora_scripts.adapter_files.architectures import architecture_by_header, architecture_by_names, not_an_adapter
from lora_scripts.adapter_files.endings import kind_of, rank_of, shape_of, split_key
from lora_scripts.adapter_files.naming import FileName, LayerNames, best_architecture, reference_names
from lora_scripts.adapter_files.owners import spelling_of
from lora_scripts.adapter_files.scales import Scales, read_scales
from lora_scripts.errors import ModelError
from lora_scripts.export.names import LANGUAGE_MODEL, as_shapes

if TYPE_CHECKING:
    from lora_scripts.adapter_files.endings import Shape
    from lora_scripts.models.weights_file import WeightsHeader

__all__ = ["open_file"]

_PIPELINE_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_OLD_ENDINGS = ("_lora.down.weight", "_lora.up.weight")


@dataclass
class _Found:
    """The parts that a file has of one layer."""

    name: FileName
    header: WeightsHeader
    scales: Scales
    parts: dict[str, str] = field(default_factory=dict)

    def shapes(self) -> dict[str, Shape]:
        return {part: self.header.tensors[key].shape for part, key in self.parts.items()}

    @property
    def kind(self) -> str:
        return kind_of(self.parts)

    @property
    def shape(self) -> Shape | None:
        return shape_of(self.kind, self.shapes())


def open_file(path: Path, layer_names: Iterable[str] | None) -> AdapterFile:
    """See adapter_file.open_adapter_file."""
    from lora_scripts.models.weights_file import inspect_weights

    found: list[_Found] = []
    strangers: list[str] = []
    keys: list[str] = []
    metadata: dict[str, str] = {}
    base_model = ""
    for file, component in _files_of(path):
        header = inspect_weights(file)
        metadata.update(header.metadata)
        keys += header.tensors
        layers, others = _group(header, component)
        found += layers
        strangers += others
        base_model = base_model or next((layer.scales.base_model for layer in layers), "")
    if not any(layer.kind != "unknown" for layer in found):
        raise ModelError(f"{path}: {not_an_adapter(keys)}")
    names, architecture, otherwise = _names(found, metadata, layer_names)
    collected: dict[str, AdapterLayer] = {}
    duplicates = []
    for one in found:
        layer = _layer(one, names, otherwise, of_loaded_model=layer_names is not None)
        if layer.name in collected:
            duplicates.append(layer.file_name)
        else:
            collected[layer.name] = layer
    spelling = spelling_of(one.name.spelling for one in found)
    return AdapterFile(
        path, spelling, architecture, collected, metadata, tuple(strangers), tuple(duplicates), base_model
    )


def _files_of(path: Path) -> list[tuple[Path, str | None]]:
    """The files to read, each with the component it is known to belong to by its folder."""
    if not path.exists():
        raise ModelError(f"{path}: no such LoRA file or folder. Check the path.")
    if path.is_file():
        return [(path, None)]
    parts: list[tuple[Path, str | None]] = [
        (path / component / "adapter_model.safetensors", component) for component in _PIPELINE_PARTS
    ]
    parts = [(file, component) for file, component in parts if file.is_file()]
    if parts:
        return parts
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if (path / name).is_file():
            return [(path / name, None)]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return [(files[0], None)]
    if not files:
        raise ModelError(
            f"{path}: a folder without a LoRA in it: no adapter_model.safetensors and no other .safetensors file. "
            "Name the LoRA's file, or a PEFT folder."
        )
    raise ModelError(f"{path}: {len(files)} .safetensors files lie in this folder. Name the one that is meant.")


def _group(header: WeightsHeader, component: str | None) -> tuple[list[_Found], list[str]]:
    """The layers of one file, and the keys that belong to none."""
    groups: dict[str, dict[str, str]] = {}
    old: set[str] = set()
    strangers = []
    for key in header.tensors:
        base, part = split_key(key)
        if not part or part in groups.get(base, {}):
            strangers.append(key)
            continue
        groups.setdefault(base, {})[part] = key
        if key.endswith(_OLD_ENDINGS):
            old.add(base)
    # An alpha or a bias on its own makes no layer.
    lonely = [base for base, parts in groups.items() if kind_of(parts) == "unknown"]
    strangers += [key for base in lonely for key in groups.pop(base).values()]
    names = {base: FileName.read(base, old_ending=base in old, component=component) for base in groups}
    if not names:
        return [], strangers
    spelling = spelling_of(name.spelling for name in names.values())
    scales = read_scales(header, spelling)
    return [_Found(names[base], header, scales, parts) for base, parts in groups.items()], strangers


def _names(
    found: list[_Found], metadata: Mapping[str, str], layer_names: Iterable[str] | None
) -> tuple[LayerNames | None, str | None, str]:
    """The model's layers, what the model is, and the component of names that do not say theirs."""
    hint = architecture_by_header(metadata)
    names, shapes = [one.name for one in found], [one.shape for one in found]
    of_language_model = any(one.scales.of_language_model for one in found)
    architecture = LANGUAGE_MODEL if of_language_model else best_architecture(names, shapes, hint)
    if architecture is None:
        architecture = architecture_by_names(name.base for name in names) or hint
    otherwise = LANGUAGE_MODEL if architecture == LANGUAGE_MODEL else "unet"
    if layer_names is not None:
        return LayerNames.of_model(as_shapes(layer_names)), architecture, otherwise
    from lora_scripts.adapter_files.reference import ARCHITECTURES

    return (reference_names(architecture) if architecture in ARCHITECTURES else None), architecture, otherwise


def _layer(one: _Found, names: LayerNames | None, otherwise: str, *, of_loaded_model: bool) -> AdapterLayer:
    kind, shapes = one.kind, one.shapes()
    rank, shape = rank_of(kind, shapes), one.shape
    own = names(one.name) if names is not None else None
    name = own if own is not None else one.name.layer(otherwise)
    model_shape = names.shapes[own] if names is not None and own is not None else None
    if not of_loaded_model and not (model_shape and shape and _same_size(shape, model_shape)):
        model_shape = model_shape if kind == "oft" and model_shape else None
    alpha, has_alpha = one.scales.of(one.name, name, one.parts, rank)
    return AdapterLayer(
        name, one.name.base, own is not None, kind, rank, alpha, has_alpha, shape, model_shape, one.parts, one.header,
        _fault(one, kind, shapes) or one.scales.fault,
    )  # fmt: skip


def _same_size(shape: Shape, model_shape: Shape) -> bool:
    from math import prod

    return shape[0] == model_shape[0] and prod(shape) == prod(model_shape)


def _fault(one: _Found, kind: str, shapes: Mapping[str, Shape]) -> str:
    """Why the pair of a LoRA cannot be one."""
    if kind not in ("lora", "dora", "tucker"):
        return ""
    path, base = one.header.path, one.name.base
    down, up = shapes.get("lora_down.weight"), shapes.get("lora_up.weight")
    if down is None or up is None:
        missing = "down" if down is None else "up"
        return f"{path}: {base} lacks its {missing} matrix. The file is damaged; fetch or export it again."
    if len(down) not in (2, 4) or len(up) not in (2, 4) or (kind != "tucker" and down[0] != up[1]):
        return (
            f"{path}: {base} is not a low-rank pair: down {list(down)}, up {list(up)}. "
            "The file is damaged or of an unknown kind."
        )
    return ""
