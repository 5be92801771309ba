"""LoRA weights as the file that diffusers writes itself: dotted names, alpha in the header."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_scripts.adapters.weights import LoRATensors, LoRAWeights, require_plain
from lora_scripts.errors import ExportError
from lora_scripts.export.names import file_path, split_layer
from lora_scripts.export.peft_config import METADATA_KEY

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["adapter_settings", "to_diffusers"]


def to_diffusers(weights: LoRAWeights, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header texts of a diffusers LoRA file.

    Keys are `unet.<path>.lora_A.weight` [R, in(, k, k)] and `.lora_B.weight` [out, R(, 1, 1)]. The tensors carry no
    scale; it stands in the header entry `lora_adapter_metadata`, one LoraConfig per component.

    Raises:
        ExportError: there is nothing to write, or a layer is a DoRA.
    Source: huggingface/diffusers, `loaders/lora_base.py`.
    """
    if not weights:
        raise ExportError("Export failed: there is no LoRA layer to write.")
    require_plain(weights)
    tensors: dict[str, Tensor] = {}
    components: dict[str, dict[str, LoRATensors]] = {}
    for layer, lora in weights.items():
        component, path = split_layer(layer)
        components.setdefault(component, {})[path] = lora
        name = f"{component}.{file_path(component, path)}"
        tensors[f"{name}.lora_A.weight"] = lora.lora_A.detach().to(device="cpu", dtype=dtype).contiguous()
        tensors[f"{name}.lora_B.weight"] = lora.lora_B.detach().to(device="cpu", dtype=dtype).contiguous()
    settings = {
        f"{component}.{setting}": value
        for component, layers in components.items()
        for setting, value in adapter_settings({path: (lora.rank, lora.alpha) for path, lora in layers.items()}).items()
    }
    return tensors, {"format": "pt", METADATA_KEY: json.dumps(settings, sort_keys=True)}


def adapter_settings(scales: Mapping[str, tuple[int, float]], *, dora: bool = False) -> dict[str, Any]:
    """A LoraConfig of one component: the commonest rank and alpha, and the layers that differ from them by name.

    Names are the paths without `text_model`: readers match them as endings, so they fit a nested and a flat CLIP.

    Args:
        scales: path of a layer -> (rank, alpha).
    """
    scales = {path.removeprefix("text_model."): scale for path, scale in scales.items()}
    rank = Counter(rank for rank, _ in scales.values()).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in scales.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": sorted(scales),
        "rank_pattern": {path: own for path, (own, _) in sorted(scales.items()) if own != rank},
        "alpha_pattern": {path: _number(own) for path, (_, own) in sorted(scales.items()) if own != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": dora,
    }


def _number(value: float) -> int | float:
    """A whole number as an integer: some readers accept no other alpha."""
    return int(value) if float(value).is_integer() else value
