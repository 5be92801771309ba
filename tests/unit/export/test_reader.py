"""What the reader of LoRA files takes, and how it refuses the rest."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import ModelError
from lora_scripts.export.kohya import read_lora_file

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
ENCODER = "text_encoder.encoder.layers.0.self_attn.q_proj"
PROJ_IN = "unet.mid_block.attentions.0.proj_in"
LAYERS = {ATTENTION: (8, 6), ENCODER: (6, 6), PROJ_IN: (8, 8, 1, 1)}
KOHYA_ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
KOHYA_ENCODER = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
KOHYA_PROJ_IN = "lora_unet_mid_block_attentions_0_proj_in"


def pair(out: int, inner: int, rank: int = 2, *, conv: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(out + inner)
    down, up = torch.randn(rank, inner), torch.randn(out, rank)
    return (down[:, :, None, None], up[:, :, None, None]) if conv else (down, up)


def kohya(name: str, out: int, inner: int, alpha: float | None = 4.0, **kw: bool) -> dict[str, torch.Tensor]:
    down, up = pair(out, inner, **kw)
    tensors = {f"{name}.lora_down.weight": down.contiguous(), f"{name}.lora_up.weight": up.contiguous()}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def test_kohya_underscores_become_the_models_own_names(tmp_path: Path) -> None:
    tensors = {
        **kohya(KOHYA_ATTENTION, 8, 6),
        **kohya(KOHYA_ENCODER, 6, 6, alpha=1.5),
        **kohya(KOHYA_PROJ_IN, 8, 8, conv=True),
    }
    file = read_lora_file(write(tmp_path / "a.safetensors", tensors, {"ss_v2": "False"}), LAYERS)
    assert file.format == "kohya"
    assert set(file.weights) == set(LAYERS)
    assert file.weights[ENCODER].alpha == 1.5
    assert file.weights[PROJ_IN].lora_A.shape == (2, 8, 1, 1)
    assert (file.name, file.ranks, file.metadata) == ("a", (2,), {"ss_v2": "False"})


def test_names_without_shapes_are_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(KOHYA_ATTENTION, 8, 6))
    assert set(read_lora_file(path, list(LAYERS)).weights) == {ATTENTION}


def test_without_a_model_the_names_are_those_of_the_published_models(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(KOHYA_PROJ_IN, 8, 8))
    assert set(read_lora_file(path).weights) == {PROJ_IN}


def test_without_a_model_unknown_kohya_names_keep_their_underscores(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya("lora_unet_double_blocks_0_img_attn_qkv", 8, 8))
    assert set(read_lora_file(path).weights) == {"unet.double_blocks_0_img_attn_qkv"}


def test_missing_alpha_is_scale_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(KOHYA_ATTENTION, 8, 6, alpha=None))
    lora = read_lora_file(path, LAYERS).weights[ATTENTION]
    assert (lora.alpha, lora.scale) == (2.0, 1.0)


def test_text_encoder_may_be_called_te1(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(KOHYA_ENCODER.replace("lora_te_", "lora_te1_"), 6, 6))
    assert set(read_lora_file(path, LAYERS).weights) == {ENCODER}


@pytest.mark.parametrize("conv", [False, True], ids=["linear in file", "conv in file"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1, 1)], ids=["linear layer", "conv layer"])
def test_one_by_one_convolution_and_linear_layer_fit_each_other(tmp_path: Path, conv: bool, shape: tuple) -> None:
    path = write(tmp_path / "a.safetensors", kohya(KOHYA_PROJ_IN, 8, 8, conv=conv))
    lora = read_lora_file(path, {PROJ_IN: shape}).weights[PROJ_IN]
    assert lora.delta().shape == shape
    down, up = pair(8, 8)
    torch.testing.assert_close(lora.delta().reshape(8, 8), 2.0 * up @ down)


DIFFUSERS = {
    "PEFT spelling": (f"{ATTENTION}.lora_A.weight", f"{ATTENTION}.lora_B.weight"),
    "named adapter": (f"{ATTENTION}.lora_A.default.weight", f"{ATTENTION}.lora_B.default.weight"),
    "lora.down": (f"{ATTENTION}.lora.down.weight", f"{ATTENTION}.lora.up.weight"),
    "lora_linear_layer": (f"{ATTENTION}.lora_linear_layer.down.weight", f"{ATTENTION}.lora_linear_layer.up.weight"),
    "attention processor": (
        ATTENTION.replace("attn2.to_k", "attn2.processor.to_k_lora.down.weight"),
        ATTENTION.replace("attn2.to_k", "attn2.processor.to_k_lora.up.weight"),
    ),
    "UNet alone, no prefix": (
        f"{ATTENTION.removeprefix('unet.')}.lora_A.weight",
        f"{ATTENTION.removeprefix('unet.')}.lora_B.weight",
    ),
}


@pytest.mark.parametrize("names", DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers_spellings_old_and_new_are_read(tmp_path: Path, names: tuple[str, str]) -> None:
    down, up = pair(8, 6)
    file = read_lora_file(write(tmp_path / "a.safetensors", {names[0]: down, names[1]: up}), LAYERS)
    assert file.format == "diffusers"
    assert set(file.weights) == {ATTENTION}
    torch.testing.assert_close(file.weights[ATTENTION].delta(), up @ down)


@pytest.mark.parametrize("stem", ["text_encoder.text_model.encoder", "text_encoder.encoder"])
@pytest.mark.parametrize("ending", ["q_proj.lora_linear_layer", "to_q_lora", "q_proj.lora"])
def test_text_encoder_is_found_with_and_without_text_model(tmp_path: Path, stem: str, ending: str) -> None:
    down, up = pair(6, 6)
    base = f"{stem}.layers.0.self_attn.{ending}"
    path = write(tmp_path / "a.safetensors", {f"{base}.down.weight": down, f"{base}.up.weight": up})
    assert set(read_lora_file(path, LAYERS).weights) == {ENCODER}


def test_to_out_of_the_old_spelling_is_to_out_0(tmp_path: Path) -> None:
    down, up = pair(8, 8)
    base = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    path = write(
        tmp_path / "a.safetensors",
        {f"{base}.processor.to_out_lora.down.weight": down, f"{base}.processor.to_out_lora.up.weight": up},
    )
    assert set(read_lora_file(path, [f"{base}.to_out.0"]).weights) == {f"{base}.to_out.0"}


def test_alpha_comes_from_diffusers_header_entry(tmp_path: Path) -> None:
    down, up = pair(8, 6)
    header = {
        "unet.r": 2,
        "unet.lora_alpha": 3,
        "unet.alpha_pattern": {"^down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": 7},
    }
    path = write(
        tmp_path / "a.safetensors",
        {
            f"{ATTENTION}.lora_A.weight": down,
            f"{ATTENTION}.lora_B.weight": up,
            f"{PROJ_IN}.lora_A.weight": pair(8, 8)[0],
            f"{PROJ_IN}.lora_B.weight": pair(8, 8)[1],
        },
        {"lora_adapter_metadata": json.dumps(header)},
    )
    weights = read_lora_file(path, LAYERS).weights
    assert (weights[ATTENTION].alpha, weights[PROJ_IN].alpha) == (7.0, 3.0)


def peft_folder(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    down, up = pair(8, 6)
    path = f"base_model.model.{ATTENTION.removeprefix('unet.')}"
    write(folder / "adapter_model.safetensors", {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up})
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def test_peft_folder_and_peft_folder_of_parts_are_read(tmp_path: Path) -> None:
    for folder in (peft_folder(tmp_path / "flat"), peft_folder(tmp_path / "parts" / "unet").parent):
        file = read_lora_file(folder, LAYERS)
        assert (file.format, set(file.weights)) == ("peft", {ATTENTION})
        assert file.weights[ATTENTION].scale == 3.0


def test_rank_stabilised_scale_is_kept(tmp_path: Path) -> None:
    file = read_lora_file(peft_folder(tmp_path / "rs", use_rslora=True), LAYERS)
    assert file.weights[ATTENTION].scale == pytest.approx(6 / 2**0.5)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOKR"}, "type LOKR"),
        ({"modules_to_save": ["conv_in"]}, "whole layers"),
        ({"bias": "all"}, "biases"),
        ({"lora_alpha": "much"}, "not numbers"),
        ({"alpha_pattern": {"attn[12].*": 3}}, "regular expression"),
    ],
)
def test_peft_config_of_another_kind_is_refused_with_the_reason(tmp_path: Path, config: dict, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        read_lora_file(peft_folder(tmp_path / "x", **config), LAYERS)


def test_peft_weights_without_their_config_are_refused_because_the_scale_is_unknown(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "x")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing.*lora_alpha"):
        read_lora_file(folder, LAYERS)


OTHERS = {
    "a LoHa": ["lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b"],
    "a LoKr": ["lora_unet_x.lokr_w1"],
    "a DoRA": [*kohya(KOHYA_ATTENTION, 8, 6), f"{KOHYA_ATTENTION}.dora_scale"],
    "an OFT": ["lora_unet_x.oft_blocks"],
    "Tucker": [*kohya(KOHYA_ATTENTION, 8, 6), f"{KOHYA_ATTENTION}.lora_mid.weight"],
}


@pytest.mark.parametrize(("kind", "keys"), OTHERS.items(), ids=OTHERS)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path: Path, kind: str, keys: list[str]) -> None:
    path = write(tmp_path / "a.safetensors", {key: torch.ones(2, 2) for key in keys})
    with pytest.raises(ModelError, match=f"{kind}.*Only plain LoRA"):
        read_lora_file(path, LAYERS)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "whole model; give it as base_model"),
        ("emb_params", "textual-inversion"),
        ("control_model.x.weight", "ControlNet"),
        ("something.else", "not a LoRA.*something.else"),
    ],
)
def test_what_is_no_lora_is_named(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        read_lora_file(write(tmp_path / "a.safetensors", {key: torch.ones(2, 2)}), LAYERS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "SDXL"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", "SDXL"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
        ("lora_unet_down_blocks_7_attentions_0_proj_in", "another base model"),
    ],
)
def test_layers_the_model_lacks_are_named_with_the_likely_reason(tmp_path: Path, name: str, reason: str) -> None:
    path = write(tmp_path / "a.safetensors", {**kohya(KOHYA_ATTENTION, 8, 6), **kohya(name, 8, 8)})
    with pytest.raises(ModelError, match=rf"1 of 2 layers are not in this model: {name}\. It .*{reason}"):
        read_lora_file(path, LAYERS)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("diffusion_model.layers.0.attention.to_q", "Z-Image"),
        ("transformer.blocks.0.attn.to_q", "a diffusion transformer"),
    ],
)
def test_lora_of_a_transformer_model_is_refused_with_the_reason(tmp_path: Path, name: str, model: str) -> None:
    down, up = pair(8, 8)
    names = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    with pytest.raises(ModelError, match=f"looks like a LoRA for {model}"):
        read_lora_file(write(tmp_path / "a.safetensors", {names[0]: down, names[1]: up}), LAYERS)


@pytest.mark.fault(22)
def test_lora_of_another_width_is_refused_with_both_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(KOHYA_ATTENTION, 8, 1024))
    with pytest.raises(ModelError, match=r"shape \[8, 1024\].*is \[8, 6\].*made for Stable Diffusion 2"):
        read_lora_file(path, LAYERS)


def test_half_a_pair_and_no_pair_are_refused(tmp_path: Path) -> None:
    half = kohya(KOHYA_ATTENTION, 8, 6)
    del half[f"{KOHYA_ATTENTION}.lora_up.weight"]
    with pytest.raises(ModelError, match="lacks its up matrix"):
        read_lora_file(write(tmp_path / "half.safetensors", half), LAYERS)
    broken = kohya(KOHYA_ATTENTION, 8, 6)
    broken[f"{KOHYA_ATTENTION}.lora_up.weight"] = torch.ones(8, 3)
    with pytest.raises(ModelError, match=r"not a low-rank pair: down \[2, 6\], up \[8, 3\]"):
        read_lora_file(write(tmp_path / "broken.safetensors", broken), LAYERS)


@pytest.mark.fault(23)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = kohya(KOHYA_ATTENTION, 8, 6)
    tensors[f"{KOHYA_ATTENTION}.lora_up.weight"][0, 0] = float("nan")
    with pytest.raises(ModelError, match=f"{KOHYA_ATTENTION}.lora_up.weight.*NaN"):
        read_lora_file(write(tmp_path / "a.safetensors", tensors), LAYERS)


@pytest.mark.fault(22)
@pytest.mark.fault(23)
def test_files_that_are_no_safetensors_are_refused_by_content(tmp_path: Path) -> None:
    pickled = tmp_path / "a.safetensors"
    torch.save({"x": torch.ones(2)}, pickled)
    with pytest.raises(ModelError, match="pickle"):
        read_lora_file(pickled, LAYERS)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(write(tmp_path / "whole.safetensors", kohya(KOHYA_ATTENTION, 8, 6)).read_bytes()[:-20])
    with pytest.raises(ModelError, match="half a download"):
        read_lora_file(cut, LAYERS)
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", 50_000_000) + b"{" + b" " * 50)
    with pytest.raises(ModelError, match="header claims 50 MB"):
        read_lora_file(huge, LAYERS)


def test_missing_and_ambiguous_paths_say_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such LoRA"):
        read_lora_file(tmp_path / "nowhere.safetensors", LAYERS)
    with pytest.raises(ModelError, match="a folder without a LoRA"):
        read_lora_file(tmp_path, LAYERS)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", kohya(KOHYA_ATTENTION, 8, 6))
    with pytest.raises(ModelError, match=r"2 \.safetensors files"):
        read_lora_file(tmp_path, LAYERS)


def test_folder_with_a_single_file_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "only.safetensors", kohya(KOHYA_ATTENTION, 8, 6))
    assert isinstance(read_lora_file(tmp_path, LAYERS).weights[ATTENTION], LoRATensors)
