"""LoRA weights as the kohya file that WebUI, Forge, ComfyUI, InvokeAI and diffusers read alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.adapters.weights import LoRAWeights, require_plain
from lora_scripts.errors import ExportError
from lora_scripts.export.names import FileNames, kohya_layer_names
from lora_scripts.export.reader import LoRAFile, read_lora_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LoRAFile", "read_lora_file", "to_kohya"]


def to_kohya(weights: LoRAWeights, names: FileNames | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a kohya file, on the CPU and contiguous: three per layer, alpha always among them.

    `lora_down.weight` is [R, in] or [R, in, k, k], `lora_up.weight` [out, R] or [out, R, 1, 1], as the layer in the
    model is a linear layer or a convolution; `alpha` is 0-d. Alpha keeps float32 where `dtype` would round it.

    Args:
        names: what each layer is called in the file; None for the names of Stable Diffusion 1 and 2.
    Raises:
        ExportError: a layer has no name, two layers share a name in the file, a layer is a DoRA, or there is nothing
            to write.
    Source: the key names that kohya-ss/sd-scripts writes.
    """
    import torch

    if not weights:
        raise ExportError("Export failed: there is no LoRA layer to write.")
    require_plain(weights)
    names = kohya_layer_names(weights) if names is None else names
    tensors: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    for layer, lora in weights.items():
        if layer not in names:
            raise ExportError(f"Export failed: a kohya file of this model has no place for {layer}.")
        name = names[layer]
        if name in written:
            raise ExportError(f"Export failed: {layer} and {written[name]} would both be called {name}.")
        written[name] = layer
        alpha = torch.tensor(lora.alpha, dtype=torch.float32)
        exact = alpha.to(dtype).float() == alpha
        tensors[f"{name}.alpha"] = alpha.to(dtype) if exact else alpha
        tensors[f"{name}.lora_down.weight"] = _plain(lora.lora_A, dtype)
        tensors[f"{name}.lora_up.weight"] = _plain(lora.lora_B, dtype)
    return tensors


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()
