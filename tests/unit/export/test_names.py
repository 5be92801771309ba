"""What layers are called in kohya files: the known ones, none twice, none forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from helpers.tiny_diffusion import tiny_parts
from lora_scripts.export.names import kohya_file_names, kohya_layer_names, layer_shapes
from lora_scripts.models.components import build_component
from lora_scripts.models.published import published_config

if TYPE_CHECKING:
    from torch import nn


@pytest.fixture(scope="module")
def full_size_sdxl() -> dict[str, nn.Module]:
    parts = ("unet", "text_encoder", "text_encoder_2")
    return {part: build_component(part, published_config(part, "sdxl"), "full size") for part in parts}


def test_sdxl_layers_have_the_original_names_and_those_of_both_text_encoders(
    full_size_sdxl: dict[str, nn.Module],
) -> None:
    names = kohya_file_names(full_size_sdxl, "sdxl")
    known = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
        "unet.up_blocks.0.attentions.2.proj_out": "lora_unet_output_blocks_2_1_proj_out",
        "unet.down_blocks.0.resnets.0.conv1": "lora_unet_input_blocks_1_0_in_layers_2",
        "unet.down_blocks.0.resnets.0.conv2": "lora_unet_input_blocks_1_0_out_layers_3",
        "unet.down_blocks.0.resnets.0.time_emb_proj": "lora_unet_input_blocks_1_0_emb_layers_1",
        "unet.down_blocks.1.resnets.0.conv_shortcut": "lora_unet_input_blocks_4_0_skip_connection",
        "unet.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
        "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
        "unet.conv_in": "lora_unet_input_blocks_0_0",
        "unet.time_embedding.linear_2": "lora_unet_time_embed_2",
        "unet.add_embedding.linear_1": "lora_unet_label_emb_0_0",
        "text_encoder.encoder.layers.11.self_attn.q_proj": "lora_te1_text_model_encoder_layers_11_self_attn_q_proj",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2": "lora_te2_text_model_encoder_layers_31_mlp_fc2",
    }
    assert {layer: names[layer] for layer in known} == known
    assert set(layer_shapes(full_size_sdxl)) - set(names) == {"text_encoder_2.text_projection"}
    assert len(set(names.values())) == len(names)


def test_the_count_of_sdxl_attention_layers_is_that_of_published_files(full_size_sdxl: dict[str, nn.Module]) -> None:
    names = kohya_file_names({"unet": full_size_sdxl["unet"]}, "sdxl").values()
    published = [name for name in names if "_transformer_blocks_" in name or name.endswith(("_proj_in", "_proj_out"))]
    assert len(published) == 722


@pytest.mark.parametrize("family", ["sd15", "sd2"])
def test_older_models_keep_the_names_of_diffusers(family: str) -> None:
    names = kohya_file_names({"unet": tiny_parts(family).unet}, family)
    assert names["unet.down_blocks.0.attentions.0.proj_in"] == "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert names["unet.mid_block.resnets.0.conv1"] == "lora_unet_mid_block_resnets_0_conv1"


def test_a_part_that_no_file_holds_has_no_names() -> None:
    assert kohya_layer_names(["vae.encoder.conv_in", "unet.conv_in"]) == {"unet.conv_in": "lora_unet_conv_in"}
