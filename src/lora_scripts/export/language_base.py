"""The base model that a language model's LoRA goes with: its folder, its layers, its weights files, the loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.builtin.weights import builtin_path, is_builtin
from lora_scripts.errors import ModelError
from lora_scripts.export.names import LANGUAGE_MODEL, layer_shapes
from lora_scripts.models.file_kinds import looks_like
from lora_scripts.models.hub import cached_file
from lora_scripts.models.language_model import load_language_model
from lora_scripts.models.recognise import read_json, shard_names

if TYPE_CHECKING:
    import torch

__all__ = ["LanguageBase", "open_base"]


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
        """For people: a hub id as it is, of a path only the last part, which gives away no folder of the user's."""
        return self.folder.resolve().name if Path(self.name).expanduser().exists() else self.name

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        return read_json(self.folder / "config.json", self.name)

    @property
    def architecture(self) -> str:
        """The class that config.json names, such as "LlamaForCausalLM"."""
        return str((self.config.get("architectures") or [""])[0])

    def weights_files(self) -> list[Path]:
        """The safetensors files that hold the model.

        Raises:
            ModelError: there are none.
        """
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return [self.folder / shard for shard in shard_names(index, self.name)]
        if (self.folder / "model.safetensors").is_file():
            return [self.folder / "model.safetensors"]
        raise ModelError(
            f"base_model {self.name}: {self.folder} holds no model.safetensors and no index of one; pickles are never "
            "loaded. Use a version of the model that has them."
        )

    def skeleton(self) -> Any:
        """The model without its weights: every module and shape, no memory.

        Raises:
            ModelError: transformers does not know this kind of model, or it wants code of its own.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(self._unusable(error)) from None

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """`language_model.<path>` to [out, in] for every linear layer."""
        return layer_shapes({LANGUAGE_MODEL: self.skeleton()})

    def load(self, dtype: torch.dtype | str = "auto") -> Any:
        """The frozen model on the CPU, in evaluation mode; "auto" keeps the dtype of its files.

        Raises:
            ModelError: it is incomplete or damaged, or transformers does not know this kind of model.
        """
        return load_language_model(self.folder, self.name, dtype)

    def _unusable(self, error: Exception) -> str:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"base_model {self.name}: it cannot be loaded ({text[:200]}). Copy or download the whole model again; program "
            "code that a model brings along is never run."
        )


def open_base(name: str) -> LanguageBase:
    """The language model behind `--base-model`: a folder, `builtin:NAME`, or a hub id in the local hub cache.

    Raises:
        ModelError: nothing is there, or it is something else.
    """
    if is_builtin(name):
        folder = builtin_path(name)
    elif (path := Path(name).expanduser()).exists():
        if path.is_file() and looks_like(path) == "gguf":
            raise ModelError(
                f"base_model {name}: is a GGUF file, whose weights are rounded for running. Name the folder of the original "
                "model, as transformers loads it."
            )
        folder = path
    else:
        config = cached_file(name, "config.json")
        if config is None:
            raise ModelError(f"base_model {name}: no such folder here, and not in the local hub cache. Check the path.")
        folder = config.parent
    if folder.is_file() or (folder / "model_index.json").is_file():
        raise ModelError(f"base_model {name}: is a picture model. Language models alone can be used here so far.")
    base = LanguageBase(name, folder)
    if not base.architecture.endswith("ForCausalLM"):
        raise ModelError(
            f"base_model {name}: is no language model that goes on with a text (config.json names "
            f"{base.architecture or 'no architecture'})."
        )
    return base
