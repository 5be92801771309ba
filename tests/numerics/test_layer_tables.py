"""The layer tables beside the real modules, and the names that diffusers turns kohya's into."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from lora_scripts.adapter_files.built_layers import built_layers
from lora_scripts.adapter_files.owners import underscored
from lora_scripts.adapter_files.readers.accepted import accepted_names
from lora_scripts.adapter_files.reference import ARCHITECTURES, reference_layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_table_is_what_the_published_configurations_build(architecture: str) -> None:
    assert list(reference_layers(architecture).values()) == built_layers(architecture)


@pytest.mark.parametrize(("architecture", "unet", "text"), [("sd15", 282, 72), ("sd2", 282, 138), ("sdxl", 794, 265)])
def test_tables_hold_every_linear_and_convolution_layer(architecture: str, unet: int, text: int) -> None:
    names = list(reference_layers(architecture))
    assert sum(name.startswith("unet.") for name in names) == unet
    assert sum(name.startswith("text_encoder") for name in names) == text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_diffusers_turns_every_accepted_kohya_name_into_a_layer_of_the_model(architecture: str) -> None:
    """Its own conversion, on one tensor per layer; what our table says that it takes comes out as the model's names."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionXLPipeline if architecture == "sdxl" else diffusers.StableDiffusionPipeline
    config = SimpleNamespace(layers_per_block=2) if architecture == "sdxl" else None
    accepted = accepted_names("diffusers", architecture)
    for names in (
        [row.kohya for row in reference_layers(architecture).values() if row.kohya],
        [f"lora_unet_{underscored(row.layer[5:])}" for row in reference_layers(architecture).values() if row.original],
    ):
        names = [name for name in names if name in accepted]
        pair = {f"{name}.lora_{side}.weight": torch.zeros(1, 1) for name in names for side in ("down", "up")}
        converted = pipeline.lora_state_dict(pair, unet_config=config)[0]
        found = {re.sub(r"[._](lora|lora_linear_layer)\.(down|up)\.weight$", "", key) for key in converted}
        assert len(found) == len(names)
        assert {name.replace(".processor.", ".") for name in found} <= {
            _old(name) for name in reference_layers(architecture)
        }


def _old(layer: str) -> str:
    """As diffusers' conversion spells attention layers."""
    if layer.startswith("unet."):
        return layer.replace(".to_out.0", ".to_out")
    return re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", layer)
