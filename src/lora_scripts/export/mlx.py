"""A LoRA as the folder that mlx-lm loads (`--adapter-path`).

Legend for shapes: R rank, in/out the layer's features.

Source: ml-explore/mlx-lm, `mlx_lm/tuner/utils.py` (settings) and `mlx_lm/tuner/lora.py` (the product x @ lora_a @ lora_b).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.adapters.weights import LoRATensors, LoRAWeights
from lora_scripts.atomic import write_atomically
from lora_scripts.atomic_folder import new_folder
from lora_scripts.errors import DataError, ExportError, ModelError
from lora_scripts.export.names import LANGUAGE_MODEL, split_layer
from lora_scripts.export.peft_folder import base_reference
from lora_scripts.export.plain import plain_scale
from lora_scripts.export.writer import require_finite, safetensors_bytes

if TYPE_CHECKING:
    import torch

    from lora_scripts.export.language_base import LanguageBase

__all__ = ["read_mlx_folder", "write_mlx_folder"]

_BLOCK_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")


def write_mlx_folder(folder: Path, weights: LoRAWeights, base: LanguageBase, dtype: torch.dtype) -> Path:
    """Writes `adapters.safetensors` and `adapter_config.json`; the folder is there whole or not at all.

    Per layer `<path>.lora_a` [in, R] and `<path>.lora_b` [R, out]. mlx-lm multiplies by `scale` as it stands, so it is
    alpha / R. `keys` names the kinds of layers, without which only two of them would get their LoRA.

    Raises:
        ExportError: not plain LoRA, a number that is not finite, a layer outside the blocks that mlx-lm knows, or the place
            cannot be written or holds files.
    """
    rank, alpha = plain_scale(weights)
    require_finite(folder, weights, dtype)
    tensors, keys = {}, set()
    for layer, lora in sorted(weights.items()):
        path = split_layer(layer)[1]
        match = _BLOCK_LAYER.fullmatch(path)
        if match is None:
            raise ExportError(
                f"Export failed: {path} lies outside the blocks (model.layers.N) that mlx-lm puts a LoRA on. Merge the LoRA "
                "into its base and use the merged model."
            )
        keys.add(match[1])
        for part, tensor in (("lora_a", lora.lora_A), ("lora_b", lora.lora_B)):
            tensors[f"{path}.{part}"] = tensor.detach().to(device="cpu", dtype=dtype).T.contiguous()
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": sorted(keys), "rank": rank, "scale": alpha / rank},
        "model": base_reference(base.name),
        "num_layers": int(base.config["num_hidden_layers"]),
    }
    try:
        with new_folder(folder) as partial:
            write_atomically(partial / "adapters.safetensors", safetensors_bytes(tensors, {"format": "mlx"}))
            write_atomically(partial / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    except DataError as error:
        raise ExportError(f"Export failed: {error}") from error
    return folder


def read_mlx_folder(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LoRATensors]:
    """The layers of an mlx-lm adapter by the model's own names.

    Args:
        shapes: all linear layers of the base, to [out, in].
    Raises:
        ModelError: the folder is damaged, no LoRA of mlx-lm, or was made for another model.
    """
    from lora_scripts.models.weights_file import inspect_weights, read_tensors

    rank, scale = _settings(folder / "adapter_config.json")
    header = inspect_weights(folder / "adapters.safetensors")
    tensors = dict(read_tensors(header, header.tensors))
    weights = {}
    for name in header.tensors:
        path, _, part = name.rpartition(".")
        layer, other = f"{LANGUAGE_MODEL}.{path}", f"{path}.lora_b"
        if part == "lora_b" and f"{path}.lora_a" in tensors:
            continue
        if part != "lora_a" or layer not in shapes or other not in tensors:
            raise ModelError(f"{header.path}: {name} is no part of a LoRA for this base model.")
        lora = LoRATensors(tensors[name].T.contiguous(), tensors[other].T.contiguous(), scale * rank)
        found = (*lora.lora_B.shape, *lora.lora_A.shape)
        if found != (shapes[layer][0], rank, rank, shapes[layer][1]):
            raise ModelError(f"{header.path}: {path} does not fit this base model or the rank {rank} of its settings.")
        weights[layer] = lora
    return weights


def _settings(path: Path) -> tuple[int, float]:
    """(rank, scale) from the settings beside the weights."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        parameters = values["lora_parameters"]
        if values["fine_tune_type"] != "lora" or "num_layers" not in values:
            raise ModelError(f"{path}: is not a plain LoRA of mlx-lm ({values['fine_tune_type']}).")
        return int(parameters["rank"]), float(parameters["scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is no adapter_config.json of mlx-lm ({error!r}).") from None
