"""From a name in a file to a layer of a model: of a given one, or of the published one that fits the file best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from lora_scripts.adapter_files.owners import Spelling, modern, owner_of, underscored
from lora_scripts.adapter_files.reference import ARCHITECTURES, original_names, reference_layers
from lora_scripts.export.names import LANGUAGE_MODEL, file_path, split_layer

__all__ = ["FileName", "LayerNames", "best_architecture", "reference_names"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FileName:
    """A key of a file without its ending.

    Attributes:
        base: as it stands in the file.
        component: of the model, or None where the file does not say.
        path: the rest of the name, in today's spelling where it has dots.
    """

    base: str
    spelling: Spelling
    component: str | None
    path: str

    @classmethod
    def read(cls, base: str, *, old_ending: bool, component: str | None = None) -> FileName:
        """`component` is what the folder says that the file lies in; the name itself goes before it."""
        spelling, owner, path = owner_of(base)
        owner = owner or component
        return cls(base, spelling, owner, modern(owner or "unet", path, old_ending=old_ending))

    def layer(self, otherwise: str) -> str:
        """A layer name in the file's own words, for models that this program has no list of."""
        return f"{self.component or otherwise}.{self.path}"


class LayerNames:
    """The layers of one model, found by any spelling of their names.

    The names of all spellings meet where `.` is written as `_`: kohya's do so already, and no two layers of a model
    differ in nothing else.
    """

    def __init__(self, layers: Mapping[str, Shape | None], original: Mapping[str, str] | None = None) -> None:
        """`layers`: component in front. `original`: path in the original U-Net, with `_`, -> path in the model."""
        self.shapes = layers
        self._found: dict[tuple[str, str], str] = {}
        for layer in layers:
            component, path = split_layer(layer)
            for spelt in (path, file_path(component, path)):
                self._found.setdefault((component, underscored(spelt)), layer)
            if component.startswith("text_encoder") and path.startswith("text_model."):
                self._found.setdefault((component, underscored(path.removeprefix("text_model."))), layer)
        for spelt, path in (original or {}).items():
            if f"unet.{path}" in layers:
                self._found.setdefault(("unet", spelt), f"unet.{path}")
        # A file of one component does not say which; the U-Net comes first in a model and so wins.
        self._components = list(dict.fromkeys(("unet", LANGUAGE_MODEL, *(split_layer(layer)[0] for layer in layers))))

    def __call__(self, name: FileName) -> str | None:
        """The layer's own name, or None where the model has no such layer."""
        path = underscored(name.path)
        components = [name.component] if name.component else self._components
        return next(
            (self._found[component, path] for component in components if (component, path) in self._found), None
        )

    @classmethod
    def of_model(cls, layers: Mapping[str, Shape | None]) -> LayerNames:
        """Of a loaded model's layers; its U-Net is found by the original's names too where all its layers are given."""
        return cls(layers, _original_names(layers))


def _original_names(layers: Iterable[str]) -> dict[str, str]:
    from lora_scripts.models.unet_layout import UNET_PREFIX, unet_names

    paths = [split_layer(layer)[1] for layer in layers if layer.startswith("unet.")]
    try:
        places = unet_names(f"{path}.weight" for path in paths)
    except (ValueError, KeyError):  # only some layers, or no Stable Diffusion: such files have no original names either
        return {}
    return {
        underscored(place.removeprefix(UNET_PREFIX).removesuffix(".weight")): name.removesuffix(".weight")
        for name, place in places.items()
    }


@cache
def reference_names(architecture: str) -> LayerNames:
    """The layers of a published model, one of reference.ARCHITECTURES."""
    shapes: dict[str, Shape | None] = {name: row.shape for name, row in reference_layers(architecture).items()}
    return LayerNames(shapes, original_names(architecture))


def best_architecture(names: Sequence[FileName], shapes: Sequence[Shape | None], hint: str | None) -> str | None:
    """The published model whose layers fit a file best; None where it knows less than half of them.

    Args:
        shapes: of the weights that the layers change, where the file tells.
        hint: what the file's header says; it decides between models that fit equally well.
    """
    scores = {}
    for architecture in ARCHITECTURES:
        table = reference_names(architecture)
        found = [table(name) for name in names]
        known = sum(layer is not None for layer in found)
        fitting = sum(
            layer is not None and shape is not None and _same_size(shape, table.shapes[layer])
            for layer, shape in zip(found, shapes, strict=True)
        )
        scores[architecture] = (known, fitting, architecture == hint)
    best = max(scores, key=lambda architecture: scores[architecture])
    return best if scores[best][0] * 2 >= max(1, len(names)) else None


def _same_size(shape: Shape, reference: Shape | None) -> bool:
    from math import prod

    return reference is not None and shape[0] == reference[0] and prod(shape) == prod(reference)
