"""From the text of `base_model:` to a model of a trained family, or to one clear message."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_scripts.errors import ModelError
from lora_scripts.models.source import resolve_base_model

SD15_NAMES = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 16),
    "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (100, 16),
}


def write_file(path: Path, names: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.randn(shape) for name, shape in names.items()}, path, metadata)
    return path


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_folder(folder: Path, unet: dict | None = None, pipeline: str = "StableDiffusionPipeline") -> Path:
    write_json(folder / "model_index.json", {"_class_name": pipeline})
    write_json(
        folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "in_channels": 4, **(unet or {})}
    )
    write_json(folder / "scheduler" / "scheduler_config.json", {"prediction_type": "epsilon"})
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        write_file(folder / part / f"{name}.safetensors", {"weight": (4, 4)})
    return folder


def test_a_single_file_is_recognised(tmp_path: Path) -> None:
    path = write_file(tmp_path / "my model.safetensors", SD15_NAMES)
    model = resolve_base_model(str(path))
    assert (model.kind, model.family, model.title, model.path) == ("single_file", "sd15", "my model", path)
    assert (model.prediction_type, model.zero_terminal_snr) == ("epsilon", False)


def test_a_diffusers_folder_is_recognised(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "some-model")
    model = resolve_base_model(f"  {folder}/ ")
    assert (model.kind, model.family, model.title) == ("diffusers_folder", "sd15", "some-model")


UNET = "model.diffusion_model."
OTHER_MODELS = {
    "refiner": ({UNET + "input_blocks.0.0.weight": (8, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (4,)}, "this is an SDXL refiner"),
    "sd3": ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": (4, 4)}, "this is a Stable Diffusion 3 model"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "this is a Flux model"),
    "flux in a checkpoint": ({UNET + "double_blocks.0.img_attn.qkv.weight": (4, 4)}, "this is a Flux model"),
    "diffusers transformer": ({"transformer_blocks.0.attn.to_q.weight": (4, 4)}, "this is a diffusion transformer alone"),
    "inpainting": ({**SD15_NAMES, UNET + "input_blocks.0.0.weight": (8, 9, 3, 3)}, r"an inpainting variant \(its UNet has 9 input channels\)"),
    "kohya lora": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 4)}, "this is a LoRA file.*init_lora_weights"),
    "peft lora": ({"base_model.model.unet.to_q.lora_A.weight": (4, 4)}, "this is a LoRA file"),
    "lokr": ({"lora_unet_x.lokr_w1": (4, 4)}, "this is a LoRA file"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, "this is a ControlNet"),
    "embedding": ({"emb_params": (4, 768)}, "this is a textual inversion embedding"),
    "vae": ({"encoder.down.0.block.0.conv1.weight": (4, 4, 3, 3), "decoder.conv_in.weight": (4, 4, 3, 3)}, "this is a VAE alone"),
    "vae with prefix": ({"first_stage_model.encoder.conv_in.weight": (4, 4, 3, 3)}, "this is a VAE alone"),
    "text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "this is a text encoder alone"),
    "t5": ({"encoder.block.0.layer.0.SelfAttention.k.weight": (4, 4), "shared.weight": (4, 4)}, "this is a text encoder alone"),
    "diffusers unet": ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3), "mid_block.resnets.0.conv1.weight": (4, 4, 3, 3)}, "this is a UNet alone.*the folder above"),
    "language model": ({"model.embed_tokens.weight": (4, 4)}, "this is a language model's weights alone.*Give the folder"),
    "later shard of a language model": ({"model.layers.20.mlp.up_proj.weight": (4, 4)}, "this is a language model's weights alone.*Give the folder"),
    "unet without the rest": ({UNET + "input_blocks.0.0.weight": (8, 4, 3, 3)}, "without its VAE and text encoder"),
    "no vae": ({name: shape for name, shape in SD15_NAMES.items() if not name.startswith("first_stage")}, "without its VAE"),
    "unknown diffusion model": ({UNET + "layers.0.weight": (4, 4)}, "of a kind that this version does not know"),
    "nothing known": ({"foo.weight": (4, 4), "bar": (3,)}, "no known kind of model; its 2 tensors are named bar, foo.weight"),
}  # fmt: skip


@pytest.mark.fault(22)
@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_another_kind_of_model_is_named(tmp_path: Path, kind: str) -> None:
    names, message = OTHER_MODELS[kind]
    path = write_file(tmp_path / "v1-5-pruned.safetensors", names)
    with pytest.raises(ModelError, match=f"(?s){message}"):
        resolve_base_model(str(path))


@pytest.mark.fault(22)
def test_the_message_for_another_family_names_the_trained_ones(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", OTHER_MODELS["sd3"][0])
    with pytest.raises(
        ModelError, match=r"x\.safetensors: this is a Stable Diffusion 3 model; this version trains sd15"
    ):
        resolve_base_model(str(path))


OTHER_FOLDERS = [
    ("StableDiffusion3Pipeline", {}, "a Stable Diffusion 3 model"),
    ("FluxPipeline", {}, "a Flux model"),
    ("KandinskyPipeline", {}, "a diffusers model of the kind KandinskyPipeline"),
    (
        "StableDiffusionXLInpaintPipeline",
        {"in_channels": 9, "addition_embed_type": "text_time"},
        "an inpainting variant",
    ),
    ("StableDiffusionDepth2ImgPipeline", {"in_channels": 5, "cross_attention_dim": 1024}, "a depth variant"),
    (
        "StableDiffusionXLImg2ImgPipeline",
        {"addition_embed_type": "text_time", "cross_attention_dim": 1280},
        "an SDXL refiner",
    ),
    ("StableDiffusionInpaintPipeline", {"in_channels": 9}, "an inpainting variant"),
]


@pytest.mark.fault(22)
@pytest.mark.parametrize(("pipeline", "unet", "message"), OTHER_FOLDERS)
def test_a_folder_of_another_family_is_named(tmp_path: Path, pipeline: str, unet: dict, message: str) -> None:
    with pytest.raises(ModelError, match=f"this is {message}"):
        resolve_base_model(str(write_folder(tmp_path / "model", unet, pipeline)))


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "clip_text_model"}, "a text encoder alone"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "a transformers model of type vit"),
        ({"_class_name": "AutoencoderKL"}, "a VAE alone"),
        ({"_class_name": "UNet2DConditionModel"}, "a UNet alone"),
        ({"_class_name": "DDIMScheduler"}, r"one part of a model \(DDIMScheduler\)"),
    ],
)
def test_a_part_or_a_transformers_folder_is_named(tmp_path: Path, config: dict, message: str) -> None:
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ModelError, match=f"this is {message}"):
        resolve_base_model(str(tmp_path))


@pytest.mark.fault(22)
def test_a_mistyped_file_gets_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "models" / "Stable-diffusion" / "v1-5-pruned.safetensors", SD15_NAMES)
    monkeypatch.chdir(tmp_path)
    folder = Path("models", "Stable-diffusion")
    near = re.escape(str(folder / "v1-5-pruned.safetensors"))
    with pytest.raises(ModelError, match=rf"no such file or folder\. Did you mean {near}\?"):
        resolve_base_model("./models/Stable-diffusion/v1-5-prunned.safetensors")
    with pytest.raises(ModelError, match=rf"Did you mean {re.escape(str(folder))}\?"):
        resolve_base_model("./models/stable-difusion/v1-5-pruned.safetensors")
    with pytest.raises(ModelError, match=r"In models.Stable-diffusion there are: v1-5-pruned\.safetensors\."):
        resolve_base_model("models/Stable-diffusion/qqq.safetensors")


@pytest.mark.fault(22)
def test_a_mistyped_folder_that_looks_like_a_hub_id_gets_both_hints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "models" / "my-model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ModelError, match=r"not in the local hub cache\. Did you mean models.my-model\?.*allow_download: true"
    ):
        resolve_base_model("models/my-modle")


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    "name", ["a..b/c", "x" * 5000, "owner/" + "y" * 300, "bad\0name", "../../nowhere/at/all", "~nobody-here/x"]
)
def test_impossible_names_end_in_a_message(name: str) -> None:
    with pytest.raises(ModelError, match="base_model"):
        resolve_base_model(name)


@pytest.mark.fault(22)
def test_a_folder_that_holds_models_is_not_one(tmp_path: Path) -> None:
    write_file(tmp_path / "one.safetensors", SD15_NAMES)
    write_folder(tmp_path / "two")
    with pytest.raises(ModelError, match=r"not itself a model\. It holds two, one\.safetensors: give one of these"):
        resolve_base_model(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no model"):
        resolve_base_model(str(tmp_path / "empty"))


@pytest.mark.fault(22)
def test_a_part_missing_from_a_folder_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors file in .*vae"):
        resolve_base_model(str(folder))
    (folder / "vae").rmdir()
    with pytest.raises(ModelError, match="its folder vae is missing"):
        resolve_base_model(str(folder))


@pytest.mark.fault(22)
def test_a_folder_with_pickles_only_is_refused_without_running_them(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.write_text, (tmp_path / "ran", "it ran"))

    folder = write_folder(tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError, match=r"unet holds its weights as a pickle only \(diffusion_pytorch_model\.bin\)"):
        resolve_base_model(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault(22)
def test_shards_are_followed_but_never_out_of_the_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole.rename(folder / "unet" / "part-1.safetensors")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    write_json(index, {"weight_map": {"weight": "part-1.safetensors"}})
    assert resolve_base_model(str(folder)).family == "sd15"
    write_json(index, {"weight_map": {"weight": "../vae/diffusion_pytorch_model.safetensors"}})
    with pytest.raises(ModelError, match="points outside its folder"):
        resolve_base_model(str(folder))
    write_json(index, {"weight_map": {}})
    with pytest.raises(ModelError, match="lists no weights"):
        resolve_base_model(str(folder))


@pytest.mark.fault(22)
@pytest.mark.parametrize("content", ["", "[1]", "{", "{" * 100_000, "\udcff"])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    folder = write_folder(tmp_path / "model")
    (folder / "unet" / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json (cannot be read|is not a JSON object)"):
        resolve_base_model(str(folder))


@pytest.mark.fault(22)
def test_an_html_page_named_like_a_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "v1-5.safetensors").write_text("<!doctype html><title>Sign in</title>")
    with pytest.raises(ModelError, match=r"v1-5\.safetensors: this is a web page, not weights"):
        resolve_base_model(str(tmp_path / "v1-5.safetensors"))


@pytest.mark.parametrize(
    ("names", "metadata", "yaml", "expected"),
    [
        ({}, {}, None, ("epsilon", False)),
        ({}, {"modelspec.prediction_type": "v"}, None, ("v_prediction", False)),
        ({}, {"modelspec.prediction_type": "epsilon"}, 'parameterization: "v"', ("epsilon", False)),
        ({"v_pred": (0,)}, {}, None, ("v_prediction", False)),
        ({"v_pred": (0,), "ztsnr": (0,)}, {}, None, ("v_prediction", True)),
        ({}, {}, 'model:\n  params:\n    parameterization: "v"\n', ("v_prediction", False)),
        ({}, {}, 'model:\n  params:\n    parameterization: "eps"\n', ("epsilon", False)),
    ],
)
def test_what_a_single_file_predicts_is_found(
    tmp_path: Path, names: dict, metadata: dict, yaml: str | None, expected: tuple
) -> None:
    path = write_file(tmp_path / "m.safetensors", SD15_NAMES | names, metadata)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    model = resolve_base_model(str(path))
    assert (model.prediction_type, model.zero_terminal_snr) == expected


def test_what_a_folder_predicts_stands_in_its_scheduler(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    model = resolve_base_model(str(folder))
    assert (model.prediction_type, model.zero_terminal_snr) == ("v_prediction", True)
    write_json(folder / "scheduler" / "scheduler_config.json", {"prediction_type": "sample"})
    with pytest.raises(ModelError, match="prediction_type 'sample'"):
        resolve_base_model(str(folder))


def test_an_unknown_builtin_name_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"mini-sb.*Did you mean mini-sd"):
        resolve_base_model("builtin:mini-sb")


@pytest.mark.fault(24)
def test_a_cached_hub_model_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    commit = "0" * 40
    snapshot = write_folder(cache / "models--someone--nice-model" / "snapshots" / commit)
    refs = cache / "models--someone--nice-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    model = resolve_base_model("someone/nice-model")
    assert (model.path, model.title, model.name) == (snapshot, "nice-model", "someone/nice-model")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="in the local hub cache, but its unet never arrived"):
        resolve_base_model("someone/nice-model")
