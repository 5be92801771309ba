"""Our networks against those of diffusers and transformers: names, numbers, gradients, and what is left to the libraries."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from helpers.tiny_diffusion import tiny_parts
from lora_scripts.models.components import build_component
from lora_scripts.models.networks.autoencoder import AutoencoderKL
from lora_scripts.models.networks.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from lora_scripts.models.networks.convolutions import ResnetBlock2D
from lora_scripts.models.networks.transformer_blocks import Transformer2DModel
from lora_scripts.models.networks.unet import UNet2DConditionModel
from lora_scripts.models.published import published_config
from lora_scripts.models.text_encoding import checkpoint_layers, read_normed, read_penultimate

FAMILIES = ("sd15", "sd2", "sdxl")


def own(reference: Any) -> Any:
    """Our network with the library's configuration and weights."""
    kind = UNet2DConditionModel if isinstance(reference, diffusers.UNet2DConditionModel) else AutoencoderKL
    network = kind(reference.config)
    network.load_state_dict(reference.state_dict())
    return network.requires_grad_(False).eval()


def inputs(family: str, size: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    width = tiny_parts(family).unet.config.cross_attention_dim
    draws = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).to(dtype)

    values: dict[str, Any] = {
        "sample": draw(2, 4, *size),
        "timestep": torch.tensor([3, 871]),
        "encoder_hidden_states": draw(2, 77, width),
    }
    if family == "sdxl":
        values["added_cond_kwargs"] = {
            "text_embeds": draw(2, 12),
            "time_ids": torch.tensor([[64, 48, 0, 8, 64, 64]] * 2).to(dtype),
        }
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_layers_have_the_names_the_order_and_the_shapes_of_the_library(family: str) -> None:
    with torch.device("meta"):
        for part in ("unet", "vae"):
            config = published_config(part, family)
            theirs = (diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL).from_config(config)
            ours = build_component(part, config, "published")
            assert isinstance(ours, UNet2DConditionModel | AutoencoderKL)
            shapes = [[(key, value.shape) for key, value in each.state_dict().items()] for each in (ours, theirs)]
            assert shapes[0] == shapes[1]
            kinds = nn.Linear, nn.Conv2d
            layers = [[name for name, m in each.named_modules() if isinstance(m, kinds)] for each in (ours, theirs)]
            assert layers[0] == layers[1]
            assert {k: v for k, v in theirs.config.items() if k[0] != "_" and ours.config[k] != v} == {}


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("family", FAMILIES)
def test_unet_predicts_and_passes_back_what_the_librarys_does(family: str, size: tuple[int, int]) -> None:
    reference = tiny_parts(family).unet
    results = []
    for unet in (own(reference), reference):
        values = inputs(family, size)
        values["sample"].requires_grad_()
        answer = unet(**values, return_dict=False)[0]
        (grad,) = torch.autograd.grad(answer.square().sum(), values["sample"])
        results.append((answer.detach(), grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_in_bfloat16_predicts_what_the_librarys_does_in_float32_and_its_pixels_stay_side_by_side(
    family: str,
) -> None:
    reference = tiny_parts(family).unet
    theirs = reference(**inputs(family)).sample
    unet = own(reference).to(torch.bfloat16, memory_format=torch.channels_last)
    outputs: list[Tensor] = []
    for module in unet.modules():
        if isinstance(module, Transformer2DModel | ResnetBlock2D):
            module.register_forward_hook(lambda _, given, out: outputs.append(out))
    values = inputs(family, dtype=torch.bfloat16)
    values["sample"] = values["sample"].contiguous(memory_format=torch.channels_last)
    assert float((unet(**values).sample.float() - theirs).norm()) < 0.03 * float(theirs.norm())
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outputs)


@pytest.mark.parametrize("timestep", [7, 7.5, torch.tensor(7)])
def test_one_noise_level_counts_for_all_pictures(timestep: Any) -> None:
    reference = tiny_parts("sd15").unet
    values = {**inputs("sd15"), "timestep": timestep}
    torch.testing.assert_close(own(reference)(**values).sample, reference(**values).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit_of_the_gradients(family: str) -> None:
    unet = own(tiny_parts(family).unet).requires_grad_(True)

    def gradients() -> list[Tensor]:
        answer = unet(**inputs(family)).sample
        return list(torch.autograd.grad(answer.square().sum(), list(unet.parameters())))

    plain = gradients()
    unet.enable_gradient_checkpointing()
    passes: list[object] = []
    unet.mid_block.attentions[0].transformer_blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))
    assert len(passes) == 2
    unet.disable_gradient_checkpointing()
    gradients()
    assert len(passes) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autoencoder_encodes_and_decodes_as_the_librarys_does(dtype: torch.dtype) -> None:
    reference = tiny_parts("sd15").vae.to(dtype)
    vae = own(reference).to(dtype)
    pixels = torch.rand(2, 3, 40, 64, generator=torch.Generator().manual_seed(2)).to(dtype) * 2 - 1
    ours, theirs = vae.encode(pixels).latent_dist, reference.encode(pixels).latent_dist
    torch.testing.assert_close((ours.mean, ours.std), (theirs.mean, theirs.std))
    torch.testing.assert_close(vae.decode(ours.mean).sample, reference.decode(ours.mean).sample)
    torch.testing.assert_close(ours.mode(), theirs.mode())


@pytest.mark.parametrize(
    ("part", "more"),
    [
        ("unet", {"time_cond_proj_dim": 256}),
        ("unet", {"class_embed_type": "timestep"}),
        ("unet", {"only_cross_attention": [True, True, True, False]}),
        ("unet", {"resnet_time_scale_shift": "scale_shift"}),
        ("vae", {"use_quant_conv": False}),
        ("vae", {"mid_block_add_attention": False}),
    ],
)
def test_what_a_configuration_asks_for_beyond_the_published_models_is_left_to_the_library(
    part: str, more: dict[str, Any]
) -> None:
    network = build_component(part, {**published_config(part, "sd15"), **more}, "unusual")
    assert type(network) in (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL)


def text_encoders(part: str, **more: Any) -> tuple[Any, Any]:
    """Ours and that of transformers with the same random weights."""
    config = {**published_config(part, "sdxl" if part == "text_encoder_2" else "sd15"), **SMALL, **more}
    torch.manual_seed(3)
    kind = "CLIPTextModelWithProjection" if part == "text_encoder_2" else "CLIPTextModel"
    theirs = getattr(transformers, kind)(transformers.CLIPTextConfig.from_dict(config)).eval()
    kinds = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    ours = kinds[kind](config).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 12,
}
IDS = torch.tensor([[1, 5, 9, 59, 59, 59], [1, 3, 59, 0, 0, 0]])


@pytest.mark.parametrize("end", [2, 59])
@pytest.mark.parametrize("skip", [1, 2, 3])
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_text_encoder_reads_what_that_of_transformers_does(part: str, skip: int, end: int) -> None:
    ours, theirs = text_encoders(part, eos_token_id=end)
    read = read_penultimate if part == "text_encoder_2" else read_normed
    mine, reference = read(ours, IDS, skip), read(theirs, IDS, skip)
    torch.testing.assert_close(mine.embeds, reference.embeds, rtol=1e-5, atol=1e-5)
    assert (mine.pooled is None) == (part == "text_encoder")
    torch.testing.assert_close(mine.pooled, reference.pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(IDS).last_hidden_state, text_of(theirs)(IDS).last_hidden_state)


def text_of(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder)


def test_checkpointing_the_text_encoder_changes_no_bit_of_the_gradients() -> None:
    ours, _ = text_encoders("text_encoder")

    def gradients() -> list[Tensor]:
        answer = ours(IDS).last_hidden_state
        return list(torch.autograd.grad(answer.square().sum(), list(ours.parameters())))

    plain = gradients()
    passes: list[object] = []
    ours.encoder.layers[1].register_forward_pre_hook(lambda *_: passes.append(1))
    checkpoint_layers(ours, True)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))
    assert len(passes) == 2
    checkpoint_layers(ours, False)
    gradients()
    assert len(passes) == 3


def test_text_encoder_with_another_activation_is_left_to_transformers() -> None:
    config = {**published_config("text_encoder", "sd15"), **SMALL, "hidden_act": "gelu_new"}
    assert type(build_component("text_encoder", config, "unusual")) is transformers.CLIPTextModel
