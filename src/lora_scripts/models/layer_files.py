"""Where the weight of every layer of a picture model lies in its files, read one by one without loading the model.

Legend for shapes: in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ModelError
from lora_scripts.export.names import kohya_file_names, layer_shapes
from lora_scripts.families import family_class
from lora_scripts.models.layout_names import Place
from lora_scripts.models.weights_file import WeightsHeader, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.models.source import BaseModel

__all__ = ["LayerFiles", "open_layer_files"]


@dataclass(frozen=True)
class LayerFiles:
    """The files of a picture model; no tensor has been read.

    Attributes:
        shapes: layer with its component in front -> shape of its weight, [out, in] or [out, in, k, k].
        places: layer -> the file that holds its weight, and where in it.
        kohya_names: layer -> its name in a kohya file, for the layers that one has a place for.
        headers: of the files of U-Net and text encoders; of a single file that one.
    """

    source: BaseModel
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, tuple[WeightsHeader, Place]]
    kohya_names: Mapping[str, str]
    headers: tuple[WeightsHeader, ...]

    @property
    def path(self) -> Path:
        return self.source.path

    def require_layers(self, path: Path, layers: Iterable[str], made_for: str) -> None:
        """Does nothing where the model has all layers that an adapter file changes.

        Args:
            path: of that file.
            made_for: the kind of model that it names, in words.
        Raises:
            ModelError: names some that it lacks.
        """
        layers = list(layers)
        missing = [layer for layer in layers if layer not in self.shapes]
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ModelError(
                f"{path}: {len(missing)} of {len(layers)} layers are not in {self.source.name}: {shown}. "
                f"The file was made for {made_for}."
            )

    def dtype(self, layer: str) -> torch.dtype:
        """The number format that the layer's weight is stored in."""
        header, place = self.places[layer]
        return header.tensors[place.name].torch_dtype

    def weight(self, layer: str) -> Tensor:
        """The layer's weight in float32.

        Raises:
            ModelError: the file is damaged there, or the weight is quantised or of another shape.
        """
        header, place = self.places[layer]
        [(_, stored)] = read_tensors(header, [place.name])
        shape = self.shapes[layer]
        if not stored.is_floating_point() or stored.element_size() == 1:
            raise ModelError(
                f"{header.path}: {place.name} is stored as {header.tensors[place.name].dtype}: the model is quantised. "
                "Use the original model."
            )
        part = place.view_of(stored)
        if part.numel() != prod(shape) or part.shape[0] != shape[0]:
            raise ModelError(
                f"{header.path}: {place.name} is {list(stored.shape)}, which is no place for a layer of {list(shape)}."
            )
        return part.float().reshape(shape).clone()


def open_layer_files(source: BaseModel) -> LayerFiles:
    """The layers of U-Net and text encoders of a model that makes pictures.

    Raises:
        ModelError: it is another kind of model, or a layer's weight is in none of its files.
    """
    from lora_scripts.models.components import build_component, component_configs
    from lora_scripts.models.sd_layout import LAYOUTS
    from lora_scripts.models.stable_diffusion import component_files

    if family_class(source.family).task != "text-to-image":
        raise ModelError(f"{source.name}: is a language model; here it must be a model that makes pictures.")
    configs = component_configs(source)
    parts = ["unet", *LAYOUTS[source.family].texts]
    modules = {part: build_component(part, configs[part], source.name) for part in parts}
    shapes = layer_shapes(modules)
    places: dict[str, tuple[WeightsHeader, Place]] = {}
    headers: dict[Path, WeightsHeader] = {}
    for part, module in modules.items():
        for header, found in component_files(source, part, module):
            headers[header.path] = header
            places |= {
                f"{part}.{name.removesuffix('.weight')}": (header, place)
                for name, place in found.items()
                if name.endswith(".weight") and place.name in header.tensors
            }
    missing = [layer for layer in shapes if layer not in places]
    if missing:
        raise ModelError(
            f"{source.name}: {len(missing)} of its layers have no weights in its files, {missing[0]} among them. "
            "The file is incomplete: use the original download."
        )
    names = kohya_file_names(modules, source.family)
    return LayerFiles(source, shapes, {layer: places[layer] for layer in shapes}, names, tuple(headers.values()))
