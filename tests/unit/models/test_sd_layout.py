"""Names of the original Stable Diffusion layout, checked on the full-size model without its weights."""

from __future__ import annotations

import pytest

from helpers.full_size_sd15 import full_size_shapes
from lora_scripts.errors import ModelError
from lora_scripts.models.sd_layout import (
    COMPONENTS,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    derive_config,
    ema_name,
    published_config,
    text_encoder_names,
    unet_names,
    vae_names,
)
from lora_scripts.models.stable_diffusion import build_component

NAMES = {"unet": unet_names, "vae": vae_names, "text_encoder": text_encoder_names}
COUNTS = {"unet": 686, "vae": 248, "text_encoder": 196}


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return full_size_shapes()


@pytest.mark.parametrize("part", COMPONENTS)
def test_every_full_size_name_has_one_place_and_back(part: str) -> None:
    names = list(build_component(part, published_config(part), "full size").state_dict())
    mapping = NAMES[part](names)
    assert len(names) == COUNTS[part]
    assert list(mapping) == names
    assert len(set(mapping.values())) == COUNTS[part]


@pytest.mark.parametrize("part", COMPONENTS)
def test_full_size_shapes_give_the_published_configuration(part: str, shapes: dict[str, tuple[int, ...]]) -> None:
    assert derive_config(part, shapes) == published_config(part)


def test_names_that_the_original_file_is_known_by_are_there(shapes: dict[str, tuple[int, ...]]) -> None:
    known = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "model.diffusion_model.time_embed.2.weight": (1280, 1280),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    }
    assert {name: shapes[name] for name in known} == known


def test_running_averages_lose_their_dots() -> None:
    assert ema_name("model.diffusion_model.input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


def test_the_older_text_encoder_layout_has_no_text_model() -> None:
    names = text_encoder_names(["text_model.final_layer_norm.bias"], with_text_model=False)
    assert names == {"text_model.final_layer_norm.bias": TEXT_PREFIX + "final_layer_norm.bias"}


def test_names_without_a_place_are_errors() -> None:
    with pytest.raises(ValueError, match="no place in the original UNet"):
        unet_names(["down_blocks.0.resnets.0.norm1.weight", "add_embedding.linear_1.weight"])
    with pytest.raises(ValueError, match="no place in the original autoencoder"):
        vae_names(["decoder.up_blocks.0.resnets.0.norm1.weight", "decoder.mid_block.surprise.weight"])


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("part", "dropped"),
    [
        ("unet", UNET_PREFIX + "input_blocks.5."),
        ("unet", UNET_PREFIX + "out.2."),
        ("vae", VAE_PREFIX + "encoder.down.1."),
        ("text_encoder", TEXT_PREFIX + "text_model.encoder.layers.3."),
    ],
)
def test_a_file_with_a_block_missing_is_refused(part: str, dropped: str, shapes: dict[str, tuple[int, ...]]) -> None:
    kept = {name: shape for name, shape in shapes.items() if not name.startswith(dropped)}
    with pytest.raises(ModelError, match=f"the {part} in this file is not built like Stable Diffusion 1.x"):
        derive_config(part, kept)


def test_what_shapes_show_goes_before_what_the_header_says(shapes: dict[str, tuple[int, ...]]) -> None:
    config = derive_config("text_encoder", shapes, {"num_hidden_layers": 10**9, "num_attention_heads": 6})
    assert config["num_hidden_layers"] == 12
    assert config["num_attention_heads"] == 6
