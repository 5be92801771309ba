"""The base model that a language model's LoRA goes with: its folder, its layers, its weights files, the loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError
from lora_scripts.export.names import LANGUAGE_MODEL, layer_shapes
from lora_scripts.families import family_class
from lora_scripts.models.language_model import load_language_model, outline_language_model
from lora_scripts.models.recognise import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_scripts.models.weights_file import WeightsHeader

__all__ = ["LanguageBase", "base_title", "open_base"]


@dataclass(frozen=True)
class LanguageBase:
    """A folder in the layout of transformers; no tensor has been read.

    Attributes:
        name: as the user wrote it.
    """

    name: str
    folder: Path

    @property
    def title(self) -> str:
        """For people."""
        return base_title(self.name, self.folder)

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        return read_json(self.folder / "config.json", self.name)

    @property
    def architecture(self) -> str:
        """The class that config.json names, such as "LlamaForCausalLM"."""
        return str((self.config.get("architectures") or [""])[0])

    def weights(self) -> list[WeightsHeader]:
        """The headers of the safetensors files that hold the model.

        Raises:
            ModelError: there are none, or one is damaged.
        """
        from lora_scripts.models.source import component_weights

        return component_weights(self.folder, self.name)

    def skeleton(self) -> PreTrainedModel:
        """The model without its weights: every module and shape, no memory.

        Raises:
            ModelError: transformers does not know this kind of model, or it wants code of its own.
        """
        return outline_language_model(self.folder, self.name)

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """`language_model.<path>` to [out, in] for every linear layer."""
        return layer_shapes({LANGUAGE_MODEL: self.skeleton()})

    def load(self, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """The frozen model on the CPU, in evaluation mode; "auto" keeps the dtype of its files.

        Raises:
            ModelError: it is incomplete or damaged, or transformers does not know this kind of model.
        """
        return load_language_model(self.folder, self.name, dtype)


def base_title(name: str, folder: Path) -> str:
    """A hub id as it is, of a path only the last part, which gives away no folder of the user's."""
    return folder.resolve().name if Path(name).expanduser().exists() else name


def open_base(name: str, *, allow_download: bool = False) -> LanguageBase:
    """The language model behind `--base-model`, as `base_model:` of a config.

    Args:
        allow_download: fetch a hub id that is not on this machine.

    Raises:
        ModelError: nothing is there, or it is something else.
    """
    from lora_scripts.models.source import resolve_base_model

    source = resolve_base_model(name, allow_download=allow_download, task="text-generation" if allow_download else None)
    if family_class(source.family).task != "text-generation":
        raise ModelError(
            f"base_model {name}: is a model that makes pictures. Here it must be a language model: a folder of transformers, "
            "or a hub id on this machine."
        )
    return LanguageBase(name, source.path)
