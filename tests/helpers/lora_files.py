"""Small LoRA files in kohya's spelling, with layers that Stable Diffusion 1.5 has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["LAYERS", "METADATA", "changes_in", "random_lora_tensors", "save_lora"]

LAYERS: Mapping[str, tuple[int, ...]] = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (1280, 1280),
    "lora_unet_down_blocks_0_resnets_0_conv1": (320, 320, 3, 3),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
}
"""Name in the file to shape of the layer's weight."""
METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_network_dim": "8",
    "ss_network_alpha": "5",
    "ss_network_module": "networks.lora",
    "ss_output_name": "before",
    "ss_tag_frequency": '{"cats": {"a cat": 3}}',
    "sshs_model_hash": "0" * 64,
    "modelspec.trigger_phrase": "inkwash",
}


def random_lora_tensors(
    rank: int, alpha: float, *, layers: Mapping[str, tuple[int, ...]] = LAYERS, seed: int = 0
) -> dict[str, torch.Tensor]:
    """kohya's three tensors for each layer, with singular values that fall."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out, inside, *kernel) in layers.items():
        falling = torch.arange(1, rank + 1).float().pow(-0.7)
        down = torch.randn(rank, inside, *kernel, generator=generator) * 0.05
        up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * 0.05
        tensors[f"{name}.lora_down.weight"] = down * falling.reshape(-1, *[1] * (1 + len(kernel)))
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def save_lora(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] = METADATA,
    dtype: torch.dtype | None = None,
) -> Path:
    """The file, its matrices in `dtype`."""
    save_file({name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}, path, dict(metadata))
    return path


def changes_in(path: Path) -> dict[str, torch.Tensor]:
    """Each layer's whole change, [out, in k k] in float64, read without this package's code."""
    tensors = load_file(path)
    names = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    changes = {}
    for name in names:
        down, up = (tensors[f"{name}.lora_{end}.weight"].double().flatten(1) for end in ("down", "up"))
        changes[name] = float(tensors[f"{name}.alpha"]) / down.shape[0] * (up @ down)
    return changes
