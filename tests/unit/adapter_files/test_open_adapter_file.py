"""What is told about an adapter file without reading its weights, in every spelling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_scripts.adapter_files.adapter_file import AdapterFile, open_adapter_file
from lora_scripts.adapter_files.reference import ARCHITECTURES, kohya_names, reference_layers
from lora_scripts.errors import ModelError

Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CLIP = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
CLIP_G = "text_encoder_2.text_model.encoder.layers.31.mlp.fc1"
ORIGINAL_Q = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def opened(path: Path, parts: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> AdapterFile:
    """A file of random tensors of these shapes; 0-d ones hold 3."""
    torch.manual_seed(0)
    tensors = {key: torch.randn(shape) if shape else torch.tensor(3.0) for key, shape in parts.items()}
    save_file(tensors, path, metadata)
    return open_adapter_file(path)


SPELLINGS = {  # beginning of the keys, the layer, spelling of the file
    "kohya": (f"lora_unet_{Q[5:].replace('.', '_')}.lora_{{}}.weight", Q, "kohya"),
    "kohya, original names": (f"lora_unet_{ORIGINAL_Q}.lora_{{}}.weight", Q, "kohya"),
    "SimpleTuner's LyCORIS": (f"lycoris_{Q[5:].replace('.', '_')}.lora_{{}}.weight", Q, "kohya"),
    "kohya CLIP": (f"lora_te_{CLIP[13:].replace('.', '_')}.lora_{{}}.weight", CLIP, "kohya"),
    "kohya CLIP-L of SDXL": (f"lora_te1_{CLIP[13:].replace('.', '_')}.lora_{{}}.weight", CLIP, "kohya"),
    "kohya CLIP-G": (f"lora_te2_{CLIP_G[15:].replace('.', '_')}.lora_{{}}.weight", CLIP_G, "kohya"),
    "diffusers": (f"{Q}.lora_{{AB}}.weight", Q, "diffusers"),
    "diffusers with adapter name": (f"{Q}.lora_{{AB}}.default.weight", Q, "diffusers"),
    "diffusers 0.17": (f"{Q.replace('.to_q', '.processor.to_q')}_lora.{{}}.weight", Q, "diffusers"),
    "diffusers 0.17, to_out": (f"{OUT.replace('.to_out.0', '.processor.to_out')}_lora.{{}}.weight", OUT, "diffusers"),
    "diffusers 0.17, no component": (f"{Q[5:].replace('.to_q', '.processor.to_q')}_lora.{{}}.weight", Q, "diffusers"),
    "lora.down": (f"{Q}.lora.{{}}.weight", Q, "diffusers"),
    "diffusers CLIP": (f"{CLIP}.lora_linear_layer.{{}}.weight", CLIP, "diffusers"),
    "CLIP without text_model": (f"{CLIP.replace('text_model.', '')}.lora_{{AB}}.weight", CLIP, "diffusers"),
    "ComfyUI, original paths": (
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_{}.weight", Q, "native",
    ),
    "OneTrainer's OMI": ("unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_{}.weight", Q, "diffusers"),
    "OneTrainer's OMI, CLIP-G": ("clip_g.text_model.encoder.layers.31.mlp.fc1.lora_{}.weight", CLIP_G, "native"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "layer", "spelling"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_a_layer_gives_the_same_layer(tmp_path: Path, key: str, layer: str, spelling: str) -> None:
    down, up = key.replace("{AB}", "A").format("down"), key.replace("{AB}", "B").format("up")
    file = opened(tmp_path / "a.safetensors", {down: (2, 640), up: (640, 2)})
    assert (list(file.layers), file.spelling, file.kinds, file.ranks) == ([layer], spelling, ("lora",), (2,))
    assert (file.layers[layer].known, file.layers[layer].shape, file.strangers) == (True, (640, 640), ())
    change, stored = file.layer(layer), torch.randn
    torch.manual_seed(0)
    a, b = stored(2, 640), stored(640, 2)
    torch.testing.assert_close(change.delta(), b @ a)


KINDS = {
    "lora": {"lora_down.weight": (2, 640), "lora_up.weight": (640, 2), "alpha": ()},
    "dora": {"lora_down.weight": (2, 640), "lora_up.weight": (640, 2), "alpha": (), "dora_scale": (640, 1)},
    "loha": {"hada_w1_a": (640, 2), "hada_w1_b": (2, 640), "hada_w2_a": (640, 2), "hada_w2_b": (2, 640), "alpha": ()},
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (160, 2), "lokr_w2_b": (2, 160), "alpha": ()},
    "full": {"diff": (640, 640)},
}


@pytest.mark.parametrize(("kind", "parts"), KINDS.items(), ids=KINDS)
def test_kinds_are_told_with_rank_and_shape_and_can_be_read(
    tmp_path: Path, kind: str, parts: dict[str, tuple[int, ...]]
) -> None:
    name = kohya_names("sdxl")[Q]
    file = opened(tmp_path / "a.safetensors", {f"{name}.{part}": shape for part, shape in parts.items()})
    layer = file.layers[Q]
    assert (layer.kind, layer.rank, layer.shape) == (kind, None if kind == "full" else 2, (640, 640))
    assert layer.alpha == (None if kind == "full" else 3.0)
    weight = torch.randn(640, 640)
    assert file.layer(Q).delta(weight).shape == (640, 640)


def test_tucker_core_and_flat_kernel_of_a_convolution_are_read(tmp_path: Path) -> None:
    conv = "unet.down_blocks.1.resnets.0.conv1"
    name = kohya_names("sdxl")[conv]
    tucker = {"lora_down.weight": (2, 320, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (640, 2, 1, 1)}
    loha = {"hada_w1_a": (640, 2), "hada_w1_b": (2, 2880), "hada_w2_a": (640, 2), "hada_w2_b": (2, 2880)}
    for kind, parts in {"tucker": tucker, "loha": loha}.items():
        file = opened(tmp_path / f"{kind}.safetensors", {f"{name}.{part}": shape for part, shape in parts.items()})
        assert file.kinds == (kind,)
        assert file.layer(conv).delta().shape == (640, 320, 3, 3)


def test_peft_dora_with_rank_stabilised_scale_and_alpha_pattern_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    path = "base_model.model.model.layers.0.self_attn"
    tensors = {}
    for name in ("q_proj", "k_proj"):
        tensors[f"{path}.{name}.lora_A.weight"] = torch.randn(4, 8)
        tensors[f"{path}.{name}.lora_B.weight"] = torch.randn(8, 4)
        tensors[f"{path}.{name}.lora_magnitude_vector"] = torch.rand(8)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True, "alpha_pattern": {"k_proj": 8}}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "meta/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = open_adapter_file(folder)
    assert (file.spelling, file.architecture, file.kinds) == ("peft", "language_model", ("dora",))
    assert (file.base_model, file.alphas) == ("meta/llama", (12.0, 16.0))  # alpha * sqrt(rank): alpha / rank then acts
    assert file.layer("language_model.model.layers.0.self_attn.q_proj").parts()["dora_scale"].numel() == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_published_model_is_told_from_shapes_alone(tmp_path: Path, architecture: str) -> None:
    layers = [row for row in reference_layers(architecture).values() if row.kohya and "attn2.to_k" in row.layer]
    parts: dict[str, tuple[int, ...]] = {}
    for row in layers:
        parts |= {f"{row.kohya}.lora_down.weight": (1, row.shape[1]), f"{row.kohya}.lora_up.weight": (row.shape[0], 1)}
    assert opened(tmp_path / "a.safetensors", parts).architecture == architecture


def test_the_header_decides_where_the_layers_of_two_models_are_alike(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    parts: dict[str, tuple[int, ...]] = {f"{name}.lora_down.weight": (1, 320), f"{name}.lora_up.weight": (320, 1)}
    assert opened(tmp_path / "a.safetensors", parts, {"ss_v2": "True"}).architecture == "sd2"
    assert opened(tmp_path / "b.safetensors", parts, {"ss_base_model_version": "sd_v1"}).architecture == "sd15"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "sd3"),
        ("transformer.transformer_blocks.0.attn.add_q_proj", "qwen_image"),
        ("diffusion_model.layers.0.attention.qkv", "z_image"),
        ("diffusion_model.blocks.0.cross_attn.k", "wan"),
    ],
)
def test_other_architectures_are_recognised_and_keep_their_spelling(
    tmp_path: Path, name: str, architecture: str
) -> None:
    file = opened(tmp_path / "a.safetensors", {f"{name}.lora_A.weight": (2, 8), f"{name}.lora_B.weight": (8, 2)})
    [layer] = file.layers.values()
    assert (file.architecture, layer.file_name, layer.known) == (architecture, name, False)


def test_alpha_that_the_file_lacks_is_the_rank_and_said_to_be_missing(tmp_path: Path) -> None:
    name = kohya_names("sdxl")[Q]
    file = opened(
        tmp_path / "a.safetensors", {f"{name}.lora_down.weight": (2, 640), f"{name}.lora_up.weight": (640, 2)}
    )
    assert (file.layers[Q].alpha, file.layers[Q].has_alpha) == (2.0, False)


def test_half_a_pair_and_keys_of_nothing_are_told_and_no_tool_goes_on_with_them(tmp_path: Path) -> None:
    name = kohya_names("sdxl")[Q]
    pair = {f"{name}.lora_down.weight": (2, 640), f"{name}.lora_up.weight": (640, 2)}
    half = opened(tmp_path / "half.safetensors", dict(list(pair.items())[:1]))
    assert "lacks its up matrix" in half.faults[0]
    for read in (half.require_sound, lambda: half.layer(Q), lambda: next(half.changes())):
        with pytest.raises(ModelError, match="lacks its up matrix"):
            read()
    odd = opened(tmp_path / "odd.safetensors", {**pair, "bundle_emb.cat.string_to_param.*": (1, 768)})
    assert odd.strangers == ("bundle_emb.cat.string_to_param.*",)
    with pytest.raises(ModelError, match="belong to no layer"):
        next(odd.changes())


def test_a_layer_in_two_spellings_is_told(tmp_path: Path) -> None:
    parts: dict[str, tuple[int, ...]] = {}
    for name in (f"lora_te_{CLIP[13:].replace('.', '_')}", f"lora_te1_{CLIP[13:].replace('.', '_')}"):
        parts |= {f"{name}.lora_down.weight": (2, 768), f"{name}.lora_up.weight": (768, 2)}
    file = opened(tmp_path / "a.safetensors", parts)
    assert len(file.duplicates) == 1
    with pytest.raises(ModelError, match="two spellings"):
        file.require_sound()


def test_opening_reads_no_weights_and_a_layer_only_its_own(tmp_path: Path) -> None:
    other = OUT.replace("to_out.0", "to_v")
    parts: dict[str, tuple[int, ...]] = {}
    for layer in (Q, other):
        name = kohya_names("sdxl")[layer]
        parts |= {f"{name}.lora_down.weight": (2, 640), f"{name}.lora_up.weight": (640, 2)}
    tensors = {key: torch.ones(shape) for key, shape in parts.items()}
    tensors[f"{kohya_names('sdxl')[other]}.lora_up.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "a.safetensors")
    file = open_adapter_file(tmp_path / "a.safetensors")
    assert file.layer(Q).rank == 2
    with pytest.raises(ModelError, match="NaN"):
        file.layer(other)
