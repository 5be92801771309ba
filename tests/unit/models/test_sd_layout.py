"""Names of the original Stable Diffusion layout, checked on the full-size model without its weights."""

from __future__ import annotations

import pytest

from helpers.full_size import full_size_shapes
from lora_scripts.errors import ModelError
from lora_scripts.models.components import build_component
from lora_scripts.models.open_clip_layout import open_clip_places
from lora_scripts.models.published import published_config
from lora_scripts.models.sd_layout import LAYOUTS, derive_config
from lora_scripts.models.unet_layout import UNET_PREFIX, ema_name, unet_names
from lora_scripts.models.vae_layout import VAE_PREFIX, vae_names

COUNTS = {
    "sd15": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sd2": {"unet": 686, "vae": 248, "text_encoder": 372},
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517},
}
COMPONENTS = [(family, part) for family, counts in COUNTS.items() for part in counts]
TEXT_PREFIX = LAYOUTS["sd15"].texts["text_encoder"].prefix


@pytest.fixture(scope="module")
def all_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    return {family: full_size_shapes(family) for family in COUNTS}


@pytest.fixture
def shapes(all_shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    return all_shapes["sd15"]


@pytest.mark.parametrize(("family", "part"), COMPONENTS)
def test_every_full_size_name_has_one_place_and_back(family: str, part: str) -> None:
    names = list(build_component(part, published_config(part, family), "full size").state_dict())
    places = LAYOUTS[family].places(part, names)
    assert len(names) == COUNTS[family][part]
    assert list(places) == names
    assert len(set(places.values())) == COUNTS[family][part]


@pytest.mark.parametrize(("family", "part"), COMPONENTS)
def test_full_size_shapes_give_the_published_configuration(
    family: str, part: str, all_shapes: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    assert derive_config(part, all_shapes[family], family=family) == published_config(part, family)


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


def test_names_that_later_files_are_known_by_are_there(all_shapes: dict[str, dict[str, tuple[int, ...]]]) -> None:
    known = {
        "sd2": {
            "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
            "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 1024),
            "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
            "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
            "cond_stage_model.model.positional_embedding": (77, 1024),
            "cond_stage_model.model.text_projection": (1024, 1024),
        },
        "sdxl": {
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
            "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
            "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
            "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
            "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias": (3840,),
            "conditioner.embedders.1.model.transformer.resblocks.31.ln_1.weight": (1280,),
            "conditioner.embedders.1.model.text_projection": (1280, 1280),
            "conditioner.embedders.1.model.ln_final.weight": (1280,),
        },
    }
    for family, names in known.items():
        assert {name: all_shapes[family][name] for name in names} == names


def test_running_averages_lose_their_dots() -> None:
    assert ema_name("model.diffusion_model.input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


def test_the_older_text_encoder_layout_has_no_text_model() -> None:
    name = "text_model.final_layer_norm.bias"
    places = LAYOUTS["sd15"].places("text_encoder", [name], [TEXT_PREFIX + "final_layer_norm.bias"])
    assert places[name].name == TEXT_PREFIX + "final_layer_norm.bias"


def test_names_without_a_place_are_errors() -> None:
    with pytest.raises(ValueError, match="no place in the original UNet"):
        unet_names(["down_blocks.0.resnets.0.norm1.weight", "encoder_hid_proj.weight"])
    with pytest.raises(ValueError, match="no place in the original autoencoder"):
        vae_names(["decoder.up_blocks.0.resnets.0.norm1.weight", "decoder.mid_block.surprise.weight"])
    with pytest.raises(ValueError, match="no place in the original OpenCLIP"):
        open_clip_places(["text_model.encoder.layers.0.mlp.fc3.weight"], "x.")


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
