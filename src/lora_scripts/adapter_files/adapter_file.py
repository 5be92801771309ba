"""Any adapter file, opened: what it is and what layers it has, without its weights; each layer is read when asked for.

file = open_adapter_file("ink.safetensors")
file.architecture, file.kinds, file.ranks          # "sdxl", ("lora",), (16,)
for name in file.layers:
    change = file.layer(name)                      # one layer's tensors in memory
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.adapter_files.architectures import TITLES
from lora_scripts.adapter_files.endings import Shape
from lora_scripts.adapter_files.owners import Spelling
from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from lora_scripts.adapters.weights import LayerChange
    from lora_scripts.models.weights_file import WeightsHeader

__all__ = ["AdapterFile", "AdapterLayer", "open_adapter_file"]


@dataclass(frozen=True)
class AdapterLayer:
    """What the header tells about one layer of an adapter.

    Attributes:
        name: component in front. The model's own name where the model is known (CLIP's layers under `text_model` if no
            loaded model was given), else the file's words.
        file_name: as it stands in the file, without the ending.
        known: whether the model has a layer of this name.
        kind: a key of endings.KINDS.
        rank: None where the kind has none.
        alpha: so that alpha / rank is the scale, whatever formula the file uses; None where the kind has no rank or the
            scale is not known.
        has_alpha: whether the file says alpha at all; readers differ in what they do if not.
        shape: of the weight that it changes; None where the file does not tell.
        model_shape: of the model's own weight: a given model's, or the published one's where it has the same size.
        parts: kohya's or LyCORIS's name of a tensor to its key in the file.
        header: of the file that it lies in.
        fault: why it cannot be read; empty for a sound layer.
    """

    name: str
    file_name: str
    known: bool
    kind: str
    rank: int | None
    alpha: float | None
    has_alpha: bool
    shape: Shape | None
    model_shape: Shape | None
    parts: Mapping[str, str]
    header: WeightsHeader = field(repr=False)
    fault: str = ""

    @property
    def component(self) -> str:
        return self.name.partition(".")[0]

    @property
    def num_bytes(self) -> int:
        return sum(self.header.tensors[key].num_bytes for key in self.parts.values())


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, its weights unread.

    Attributes:
        path: the file, or the folder it lies in.
        spelling: "kohya", "diffusers", "peft" or "native" (the original model's own paths).
        architecture: "sd15", "sd2", "sdxl", "language_model", or another key of architectures.TITLES; None if unknown.
        layers: by name, in the order of the file.
        metadata: the header's texts; of a folder of several files those of all.
        strangers: keys that belong to no layer.
        duplicates: layers that stand in the file in two spellings; the later one is left out of `layers`.
        base_model: what an adapter configuration says that it was made for; empty if none says.
    """

    path: Path
    spelling: Spelling
    architecture: str | None
    layers: Mapping[str, AdapterLayer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    base_model: str = ""

    @property
    def name(self) -> str:
        """The name it goes by in `<lora:NAME:1>`."""
        return self.path.stem if self.path.suffix == ".safetensors" else self.path.name

    @property
    def title(self) -> str:
        """The model it was made for, in words."""
        return TITLES.get(self.architecture or "", "a model that is not known here")

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its layers, commonest first."""
        return tuple(kind for kind, _ in Counter(layer.kind for layer in self.layers.values()).most_common())

    @property
    def is_plain(self) -> bool:
        """Whether every layer is a plain LoRA."""
        return self.kinds == ("lora",)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({layer.rank for layer in self.layers.values() if layer.rank is not None}))

    @property
    def alphas(self) -> tuple[float, ...]:
        """The alphas that occur, ascending."""
        return tuple(sorted({layer.alpha for layer in self.layers.values() if layer.alpha is not None}))

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the file cannot be used as it is: a missing configuration, half a pair. Empty for a sound file."""
        return tuple(dict.fromkeys(layer.fault for layer in self.layers.values() if layer.fault))

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.component for layer in self.layers.values()))

    def headers(self) -> list[WeightsHeader]:
        """Of the files that it consists of."""
        return list({layer.header.path: layer.header for layer in self.layers.values()}.values())

    def dtypes(self) -> Counter[str]:
        """The format's names of the matrices' dtypes, "F16", "BF16", ..., with the number of tensors."""
        return Counter(
            layer.header.tensors[key].dtype
            for layer in self.layers.values()
            for part, key in layer.parts.items()
            if part != "alpha"
        )

    def layer(self, name: str) -> LayerChange:
        """One layer's change, its tensors in the file's dtype on the CPU; nothing else is read.

        Raises:
            KeyError: the file has no such layer.
            ModelError: a kind that is not read, tensors that do not fit each other or the model, numbers that are not finite.
        """
        from lora_scripts.adapter_files.layer_change import read_change

        return read_change(self.layers[name])

    def changes(self) -> Iterator[tuple[str, LayerChange]]:
        """Every layer's name and change, one in memory at a time.

        Raises:
            ModelError: as `layer`, and what `require_sound` raises.
        """
        self.require_sound()
        for name in self.layers:
            yield name, self.layer(name)

    def require_sound(self) -> None:
        """Stops a tool from working on half of a file.

        Raises:
            ModelError: keys that belong to nothing, a layer in two spellings, or one of `faults`.
        """
        if self.faults:
            raise ModelError("\n".join(self.faults))
        if self.duplicates:
            raise ModelError(
                f"{self.path}: {', '.join(self.duplicates[:5])} stand in the file in two spellings, and which one counts is "
                "unknown. Export the file again."
            )
        if self.strangers:
            more = f" and {len(self.strangers) - 5} more" if len(self.strangers) > 5 else ""
            raise ModelError(
                f"{self.path}: {', '.join(self.strangers[:5])}{more} belong to no layer of an adapter, so the file would be read "
                "only in part. See all of it: lora-scripts inspect."
            )


def open_adapter_file(path: str | Path, layer_names: Iterable[str] | None = None) -> AdapterFile:
    """An adapter in any spelling, its header read and its weights not.

    Args:
        path: a `.safetensors` file, a PEFT folder (also one with `unet/` and `text_encoder/` in it), or a folder that holds
            a single `.safetensors` file.
        layer_names: all layer names of a loaded model, component in front; a mapping to weight shapes, as `layer_shapes`
            gives, has the shapes checked too. Without it the published models' layers are used.
    Raises:
        ModelError: no adapter, or not even a whole safetensors file; tells what it is. What can be told about a damaged or
            unusual adapter is in `faults`, `strangers` and `duplicates`, so that it can be looked at.
    """
    from lora_scripts.adapter_files.opening import open_file

    return open_file(Path(path), layer_names)
