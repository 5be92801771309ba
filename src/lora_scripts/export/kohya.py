"""LoRA weights as the kohya file that WebUI, Forge, ComfyUI, InvokeAI and diffusers read alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.adapters.weights import LayerChanges, require_plain
from lora_scripts.errors import ExportError
from lora_scripts.export.names import FileNames, kohya_layer_names
from lora_scripts.export.reader import LoRAFile, read_lora_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LoRAFile", "read_lora_file", "to_kohya"]


def to_kohya(
    weights: LayerChanges, names: FileNames | None, dtype: torch.dtype, *, own_kind: bool = False
) -> dict[str, Tensor]:
    """The tensors of a kohya file, on the CPU and contiguous, alpha always among them.

    `lora_down.weight` is [R, in] or [R, in, k, k], `lora_up.weight` [out, R] or [out, R, 1, 1], as the layer in the
    model is a linear layer or a convolution; `alpha` is 0-d. Alpha keeps float32 where `dtype` would round it.

    Args:
        names: what each layer is called in the file; None for the names of Stable Diffusion 1 and 2.
        own_kind: also other kinds, in the tensors that LyCORIS gives them: `hada_w1_a`, `lokr_w1`, `dora_scale` ...
    Raises:
        ExportError: a layer has no name, two layers share a name in the file, a layer is no plain LoRA and `own_kind` is off,
            or there is nothing to write.
    Source: the key names that kohya-ss/sd-scripts and LyCORIS write.
    """
    if not weights:
        raise ExportError("Export failed: there is no LoRA layer to write.")
    if not own_kind:
        require_plain(weights)
    names = kohya_layer_names(weights) if names is None else names
    tensors: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    for layer, change in weights.items():
        if layer not in names:
            raise ExportError(f"Export failed: a kohya file of this model has no place for {layer}.")
        name = names[layer]
        if name in written:
            raise ExportError(f"Export failed: {layer} and {written[name]} would both be called {name}.")
        written[name] = layer
        for part, tensor in change.parts().items():
            narrow = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            exact = part != "alpha" or bool(narrow.float() == tensor.float())
            tensors[f"{name}.{part}"] = narrow if exact else tensor.detach().float().cpu()
    return tensors
