"""Alpha of each layer, from wherever a file keeps it: a tensor, diffusers' header entry, PEFT's `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_scripts.errors import ModelError
from lora_scripts.export.names import file_path, split_layer
from lora_scripts.export.peft_config import LANGUAGE_MODEL_TASK, AdapterConfig, folder_config, header_configs

if TYPE_CHECKING:
    from lora_scripts.adapter_files.naming import FileName
    from lora_scripts.adapter_files.owners import Spelling
    from lora_scripts.models.weights_file import WeightsHeader

__all__ = ["Scales", "read_scales"]


@dataclass(frozen=True)
class Scales:
    """What one file says about its scales.

    Attributes:
        tensors: alpha by the key it stands under.
        configs: settings outside the tensors, by component; "" is for all components.
        fault: why the settings cannot be used; the layers then have no known scale.
    """

    tensors: Mapping[str, float] = field(default_factory=dict)
    configs: Mapping[str, AdapterConfig] = field(default_factory=dict)
    fault: str = ""

    @property
    def of_language_model(self) -> bool:
        return any(config.task_type == LANGUAGE_MODEL_TASK for config in self.configs.values())

    @property
    def base_model(self) -> str:
        return next((config.base_model for config in self.configs.values() if config.base_model), "")

    def of(self, name: FileName, layer: str, parts: Mapping[str, str], rank: int | None) -> tuple[float | None, bool]:
        """(alpha, whether the file says it) of one layer; alpha / rank is the scale that acts."""
        if "alpha" in parts:
            return self.tensors.get(parts["alpha"]), True
        if rank is None or self.fault:
            return None, False
        component, path = split_layer(layer)
        config = self.configs.get(component) or self.configs.get("")
        if config is None:
            return float(rank), False
        return config.alpha_of((path, file_path(component, path), name.path), rank), True


def read_scales(header: WeightsHeader, spelling: Spelling) -> Scales:
    """The alphas and settings of one file; a file that lacks its settings has them in `fault`."""
    from lora_scripts.models.weights_file import read_tensors

    keys = [key for key in header.tensors if key.endswith(".alpha") and header.tensors[key].num_bytes <= 8]
    tensors = {key: float(value.reshape(-1)[0]) for key, value in read_tensors(header, keys, finite=False)}
    try:
        if spelling == "peft":
            return Scales(tensors, {"": folder_config(header.path, plain_only=False)})
        return Scales(tensors, header_configs(header.path, header.metadata, plain_only=False))
    except ModelError as error:
        return Scales(tensors, fault=str(error))
