"""locon on every U-Net family: the convolutions train, and each has its place in a kohya file."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny_diffusion import tiny_parts
from lora_scripts.adapters.lora import attach
from lora_scripts.attaching import with_convolutions
from lora_scripts.export.kohya import to_kohya
from lora_scripts.export.names import kohya_file_names
from lora_scripts.families.latent_diffusion import UNET_ATTENTION, LatentDiffusion


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd15", "lora_unet_down_blocks_0_resnets_0_conv1"),
        ("sd2", "lora_unet_down_blocks_0_resnets_0_time_emb_proj"),
        ("sdxl", "lora_unet_input_blocks_1_0_in_layers_2"),
    ],
)
def test_convolutions_train_and_have_names_that_readers_know(family: str, expected: str) -> None:

    components = {"unet": tiny_parts(family).unet}  # type: ignore[arg-type]
    targets = with_convolutions({"unet": UNET_ATTENTION}, LatentDiffusion.conv_targets, components)
    adapter = attach(components, targets, rank=2, alpha=2.0, kind="locon", conv_rank=1)
    ranks = {layer.rank for layer in adapter.layers.values() if layer.base.weight.ndim == 4}
    assert 1 in ranks
    file = to_kohya(adapter.weights(), kohya_file_names(components, family), torch.float32)
    assert f"{expected}.lora_down.weight" in file
    assert len(file) == 3 * len(adapter.layers)
