"""Stable Diffusion 1.x files: what we read and write is what diffusers reads and writes, weight by weight."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_scripts.errors import ExportError, ModelError
from lora_scripts.models.components import CONFIG_KEY
from lora_scripts.models.single_file import original_state_dict, schedule_tables, write_single_file
from lora_scripts.models.source import resolve_base_model
from lora_scripts.models.stable_diffusion import StableDiffusionParts, load_stable_diffusion
from lora_scripts.models.unet_layout import ema_name

WIDTH = 16
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
VOCAB = len(WORDS)

LAYOUTS: dict[str, dict[str, Any]] = {
    "two levels": {
        "unet": {"block_out_channels": (8, 16), "layers_per_block": 2},
        "attention": (True, False),
        "vae": {"block_out_channels": (8, 16), "layers_per_block": 1},
    },
    "four levels like the original": {
        "unet": {"block_out_channels": (8, 16, 24, 24), "layers_per_block": 2},
        "attention": (True, True, True, False),
        "vae": {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 2},
    },
    "attention only inside": {
        "unet": {"block_out_channels": (8, 16, 16), "layers_per_block": 1},
        "attention": (False, True, True),
        "vae": {"block_out_channels": (8, 8, 16), "layers_per_block": 1},
    },
    "one level": {
        "unet": {"block_out_channels": (8,), "layers_per_block": 3},
        "attention": (True,),
        "vae": {"block_out_channels": (8,), "layers_per_block": 1},
    },
}


def write_tokenizer(beside: Path) -> None:
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, merges=[], model_max_length=77)
    tokenizer.save_pretrained(beside / "tokenizer")


def build(layout: str = "two levels") -> dict[str, Any]:
    """UNet, VAE and text encoder with random weights; settings that shapes do not show differ from the published ones."""
    torch.manual_seed(0)
    settings = LAYOUTS[layout]
    attention = settings["attention"]
    unet = UNet2DConditionModel(
        **settings["unet"],
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
        attention_head_dim=2,
        sample_size=16,
    )
    levels = len(settings["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        **settings["vae"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=40,
            num_attention_heads=2,
            num_hidden_layers=3,
            vocab_size=VOCAB,
            bos_token_id=VOCAB - 2,
            eos_token_id=VOCAB - 1,
            projection_dim=WIDTH,
            hidden_act="gelu",
        )
    )
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder}


def save_folder(folder: Path, parts: dict[str, Any], scheduler: dict[str, Any] | None = None) -> Path:
    for name, module in parts.items():
        module.save_pretrained(folder / name)
    write_tokenizer(folder)
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **(scheduler or {})
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> StableDiffusionParts:
    return load_stable_diffusion(resolve_base_model(str(path)), "cpu", dtype, **options)


def assert_same_weights(ours: Any, reference: Any) -> None:
    ours, reference = ours.state_dict(), reference.state_dict()
    assert ours.keys() == reference.keys()
    different = [name for name in ours if not torch.equal(ours[name], reference[name])]
    assert not different


@torch.no_grad()
def outputs(unet: Any, vae: Any, text_encoder: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (2, 77), generator=generator)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    pixels = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    text = text_encoder(ids).last_hidden_state
    noise_pred = unet(latents, torch.tensor([10, 900]), encoder_hidden_states=text).sample
    return [text, noise_pred, vae.encode(pixels).latent_dist.mean, vae.decode(latents).sample]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return build()


@pytest.fixture(scope="module")
def folder(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny") / "model", parts)


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    write_single_file(folder, path, torch.float32)
    write_tokenizer(path.parent)
    return path


@pytest.fixture
def edited(single: Path, tmp_path: Path) -> Any:
    """A function that writes the single file anew with some tensors changed, and without header entries if asked."""

    def edit(change: Any, metadata: bool = True) -> Path:
        with safe_open(single, "pt") as file:
            header = file.metadata()
        tensors = load_file(single)
        change(tensors)
        write_tokenizer(tmp_path)
        save_file(tensors, tmp_path / "edited.safetensors", header if metadata else {"format": "pt"})
        return tmp_path / "edited.safetensors"

    return edit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_to_single_file_and_back_keeps_every_weight_and_setting(layout: str, tmp_path: Path) -> None:
    parts = build(layout)
    from_folder = load(save_folder(tmp_path / "model", parts))
    write_tokenizer(tmp_path)
    write_single_file(from_folder, tmp_path / "single.safetensors", torch.float32)
    from_file = load(tmp_path / "single.safetensors")
    for name, reference in parts.items():
        assert_same_weights(getattr(from_folder, name), reference)
        assert_same_weights(getattr(from_file, name), reference)
    for ours, reference in zip(
        outputs(from_file.unet, from_file.vae, from_file.text_encoder),
        outputs(*(parts[name].eval() for name in ("unet", "vae", "text_encoder"))),
        strict=True,
    ):
        # Equal settings too: another number of heads or norm groups, or another activation, would show here.
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)
    assert from_file.vae.config.scaling_factor == 0.7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_own_converter_reads_our_single_file_the_same(layout: str, tmp_path: Path) -> None:
    parts = build(layout)
    folder = save_folder(tmp_path / "model", parts)
    write_single_file(folder, tmp_path / "single.safetensors", torch.float32)
    options = {"config": str(folder), "local_files_only": True}
    path = str(tmp_path / "single.safetensors")
    assert_same_weights(UNet2DConditionModel.from_single_file(path, subfolder="unet", **options), parts["unet"])
    assert_same_weights(AutoencoderKL.from_single_file(path, subfolder="vae", **options), parts["vae"])


def test_diffusers_own_converter_reads_the_text_encoder_the_same(
    single: Path, folder: Path, parts: dict[str, Any]
) -> None:
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, load_single_file_checkpoint

    reference = create_diffusers_clip_model_from_ldm(
        CLIPTextModel,
        load_single_file_checkpoint(str(single)),
        subfolder="text_encoder",
        config=str(folder),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    assert_same_weights(load(single).text_encoder, reference)
    assert_same_weights(load(single).text_encoder, parts["text_encoder"])


def test_a_folder_loads_as_diffusers_and_transformers_load_it(folder: Path) -> None:
    ours = load(folder)
    references = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }
    for name, reference in references.items():
        assert_same_weights(getattr(ours, name), reference)
    for mine, theirs in zip(
        outputs(ours.unet, ours.vae, ours.text_encoder), outputs(*references.values()), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_the_model_is_frozen_in_evaluation_mode_and_whole(single: Path) -> None:
    model = load(single)
    for module in (model.unet, model.vae, model.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
        assert not any(buffer.is_meta for buffer in module.buffers())


@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_files_of_every_dtype_load_as_asked(
    folder: Path, tmp_path: Path, parts: dict[str, Any], file_dtype: torch.dtype
) -> None:
    write_single_file(folder, tmp_path / "x.safetensors", file_dtype)
    write_tokenizer(tmp_path)
    model = load(tmp_path / "x.safetensors", torch.bfloat16, vae_dtype=torch.float32)
    assert {tensor.dtype for tensor in model.unet.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.text_encoder.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.vae.parameters()} == {torch.float32}
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, parts["unet"].state_dict()[name].to(file_dtype).to(torch.bfloat16))


def test_the_header_says_what_shapes_do_not_show_and_nothing_else(single: Path) -> None:
    with safe_open(single, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    written = json.loads(metadata[CONFIG_KEY])
    assert written["unet"]["norm_num_groups"] == 4
    assert written["vae"]["scaling_factor"] == 0.7
    assert len(metadata[CONFIG_KEY]) < 8000


def test_the_noise_schedule_tables_are_diffusers(single: Path) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tensors = load_file(single)
    torch.testing.assert_close(tensors["alphas_cumprod"], scheduler.alphas_cumprod, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(tensors["betas"], scheduler.betas, rtol=1e-5, atol=1e-8)
    assert tensors["alphas_cumprod"].dtype == torch.float32
    with pytest.raises(ExportError, match="beta_schedule 'squaredcos_cap_v2'"):
        schedule_tables(
            {"beta_start": 0.1, "beta_end": 0.2, "num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"}
        )


def test_a_written_file_has_the_users_usual_permissions(single: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert stat.S_IMODE(single.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert sorted(os.listdir(single.parent)) == [single.name, "tokenizer"]


@pytest.mark.parametrize("keys", ["no position_ids", "no schedule tables", "older text layout", "extra losses"])
def test_variants_of_the_layout_load_the_same(edited: Any, parts: dict[str, Any], keys: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        prefix = "cond_stage_model.transformer."
        if keys != "extra losses":
            del tensors[prefix + "text_model.embeddings.position_ids"]
        if keys == "no schedule tables":
            for name in [name for name in tensors if "." not in name]:
                del tensors[name]
        if keys == "older text layout":
            for name in [name for name in tensors if name.startswith(prefix)]:
                tensors[name.replace("text_model.", "")] = tensors.pop(name)
        if keys == "extra losses":
            tensors["first_stage_model.loss.logvar"] = torch.zeros(())
            tensors["cond_stage_model.logit_scale"] = torch.zeros(())
            tensors["model_ema.num_updates"] = torch.tensor(7)

    model = load(edited(change))
    for name, reference in parts.items():
        assert_same_weights(getattr(model, name), reference)


def test_vae_attention_as_linear_layers_is_read_too(edited: Any, parts: dict[str, Any]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mid.attn_1." in name and tensors[name].ndim == 4]:
            tensors[name] = tensors[name][:, :, 0, 0].contiguous()

    assert_same_weights(load(edited(change)).vae, parts["vae"])


def test_without_our_header_the_shapes_decide_and_the_rest_is_as_published(edited: Any) -> None:
    # Norm groups and heads of this tiny model are not the published ones, and 8 channels have no 32 groups.
    with pytest.raises(ModelError, match="the configuration of its unet is not valid"):
        load(edited(lambda tensors: None, metadata=False))


def test_a_scaled_down_file_of_published_settings_needs_no_header(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=128, attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "eos_token_id": 2,
        "bos_token_id": 0,
    }
    text_encoder = CLIPTextModel(CLIPTextConfig(**config))
    parts = {"unet": unet.eval(), "vae": vae.eval(), "text_encoder": text_encoder.eval()}
    write_single_file(save_folder(tmp_path / "model", parts), tmp_path / "a.safetensors", torch.float32)
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    write_tokenizer(tmp_path)
    model = load(tmp_path / "b.safetensors")
    for ours, reference in zip(
        outputs(model.unet, model.vae, model.text_encoder), outputs(unet, vae, text_encoder), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


def add_average(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
        tensors[ema_name(name)] = tensors[name] * 2


def test_plain_weights_come_before_the_running_average(edited: Any, parts: dict[str, Any]) -> None:
    path = edited(add_average)
    assert_same_weights(load(path).unet, parts["unet"])
    averaged = load(path, use_ema=True).unet.state_dict()
    assert all(torch.equal(averaged[name], tensor * 2) for name, tensor in parts["unet"].state_dict().items())


def test_a_file_with_the_running_average_only_loads_it(edited: Any, parts: dict[str, Any]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        add_average(tensors)
        for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
            del tensors[name]

    averaged = load(edited(change)).unet.state_dict()
    assert all(torch.equal(averaged[name], tensor * 2) for name, tensor in parts["unet"].state_dict().items())


def test_asking_for_an_average_that_is_not_there_is_an_error(single: Path) -> None:
    with pytest.raises(ModelError, match="use_ema: the file holds no running average"):
        load(single, use_ema=True)


def test_velocity_and_zero_terminal_snr_survive_the_file(parts: dict[str, Any], tmp_path: Path) -> None:
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    folder = save_folder(tmp_path / "model", parts, scheduler)
    write_single_file(folder, tmp_path / "x.safetensors")
    write_tokenizer(tmp_path)
    for path in (folder, tmp_path / "x.safetensors"):
        source = resolve_base_model(str(path))
        assert (source.prediction_type, source.zero_terminal_snr) == ("v_prediction", True)
        model = load(path)
        assert model.prediction_type == "v_prediction"
        assert model.scheduler_config["rescale_betas_zero_snr"] is True
        assert DDPMScheduler.from_config(model.scheduler_config).config.prediction_type == "v_prediction"


UNET = "model.diffusion_model."
DAMAGES = {
    "a tensor missing": (lambda tensors: tensors.pop(UNET + "input_blocks.1.0.emb_layers.1.bias"), "the unet does not match its configuration: 1 tensors are missing, first down_blocks.0.resnets.0.time_emb_proj.bias"),
    "a tensor too many": (lambda tensors: tensors.update({UNET + "output_blocks.9.0.in_layers.0.bias": torch.zeros(8)}), "1 tensors fit nowhere, first model.diffusion_model.output_blocks.9"),
    "another shape": (lambda tensors: tensors.update({UNET + "out.0.bias": torch.zeros(9)}), r"the unet's conv_norm_out.bias has shape \[9\], expected \[8\]"),
    "not a number": (lambda tensors: tensors[UNET + "middle_block.1.proj_in.weight"][0, 0].fill_(torch.nan), r"middle_block\.1\.proj_in\.weight holds 1 values of 256 that are NaN or infinite"),
    "infinity": (lambda tensors: tensors["first_stage_model.quant_conv.bias"][2:].fill_(torch.inf), r"first_stage_model\.quant_conv\.bias holds 6 values of 8"),
    "a VAE layer missing": (lambda tensors: tensors.pop("first_stage_model.decoder.mid.attn_1.q.bias"), "the vae does not match its configuration: 1 tensors are missing"),
    "a text layer missing": (lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name], "the text_encoder in this file is not built like"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(edited: Any, damage: str) -> None:
    change, message = DAMAGES[damage]
    with pytest.raises(ModelError, match=message):
        load(edited(change))


def test_a_damaged_header_entry_is_named(single: Path, tmp_path: Path) -> None:
    for entry in ("{", "[1]", '{"unet": 3}', '{"dragon": {}}'):
        save_file(load_file(single), tmp_path / "x.safetensors", {CONFIG_KEY: entry})
        with pytest.raises(ModelError, match=r"the header entry lora_scripts\.config is damaged"):
            load(tmp_path / "x.safetensors")


def test_parts_of_different_models_are_told(parts: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    other = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=24,
            intermediate_size=8,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=VOCAB,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    with pytest.raises(ModelError, match="its text encoder is 24 wide and its UNet expects 16"):
        load(save_folder(tmp_path / "model", parts | {"text_encoder": other}))


def test_folders_of_older_versions_load_the_same(folder: Path, parts: dict[str, Any], tmp_path: Path) -> None:
    """fp16 names, a `text_model.` in front of the text encoder's names, position_ids, and the VAE's former attention names."""
    old = save_folder(tmp_path / "model", parts)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = load_file(old / "vae" / "diffusion_pytorch_model.safetensors")
    for now, then in former.items():
        vae = {name.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): tensor for name, tensor in vae.items()}
    (old / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(vae, old / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    text = load_file(old / "text_encoder" / "model.safetensors")
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, old / "text_encoder" / "model.safetensors")
    model = load(old)
    for name, reference in parts.items():
        assert_same_weights(getattr(model, name), reference)


def test_the_tokenizer_beside_a_single_file_is_used(folder: Path, tmp_path: Path) -> None:
    write_single_file(folder, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="Put the model's tokenizer folder beside the file"):
        load(tmp_path / "x.safetensors")
    write_tokenizer(tmp_path)
    assert load(tmp_path / "x.safetensors").tokenizer("ab").input_ids == [52, 0, 27, 53]


def test_a_unet_that_the_layout_cannot_hold_is_not_written(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    odd = UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=WIDTH, norm_num_groups=4, class_embed_type="timestep",
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"the unet cannot be written as a single file: class_embedding"):
        original_state_dict(replace(model, unet=odd), torch.float32)
