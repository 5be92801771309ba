"""An SDXL LoRA file with the original names means the same to diffusers: every linear layer, the same change."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from helpers.tiny_diffusion import tiny_parts
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.export.names import kohya_file_names, layer_shapes
from lora_scripts.export.writer import write_lora

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TARGETS = (*UNET_TARGETS, "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def test_sdxl_file_with_both_text_encoders_loads_in_diffusers_with_every_change(tmp_path: Path) -> None:
    parts = tiny_parts("sdxl")
    components = parts.components
    names = kohya_file_names(components, "sdxl")
    generator = torch.Generator().manual_seed(0)
    weights = {
        layer: LoRATensors(
            torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator), alpha=3.0
        )
        for layer, shape in layer_shapes(components).items()
        if layer.endswith(TARGETS)
    }
    write_lora(tmp_path / "x.safetensors", weights, {}, torch.float32, names)
    pipeline = StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        text_encoder_2=parts.text_encoder_2,
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer_2,
        unet=parts.unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    found = {}
    for component in components:
        for path, module in getattr(pipeline, component).named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                (adapter,) = module.lora_A
                change = module.lora_B[adapter].weight @ module.lora_A[adapter].weight * module.scaling[adapter]
                found[f"{component}.{path.removeprefix('text_model.')}"] = change
    assert found.keys() == weights.keys()
    for layer, change in found.items():
        torch.testing.assert_close(change, weights[layer].delta(), rtol=1e-5, atol=1e-6)
