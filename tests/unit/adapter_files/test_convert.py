"""Spellings turned into each other and back: what both can say comes back bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.allocator import allocated_peak
from helpers.picture_loras import lora_weights, rewritten, write_ours
from lora_scripts.adapter_files.adapter_file import open_adapter_file
from lora_scripts.adapter_files.conversion import Target, convert_file
from lora_scripts.adapter_files.copying import CopiedTensor, write_copies
from lora_scripts.adapter_files.readers import verdicts
from lora_scripts.adapter_files.reference import ARCHITECTURES, kohya_names
from lora_scripts.cli import main
from lora_scripts.errors import ModelError
from lora_scripts.models.weights_file import inspect_weights


def converted(path: Path, to: Target, output: Path) -> Path:
    convert_file(open_adapter_file(path), to, output)
    return output


def assert_same_file(path: Path, other: Path) -> None:
    """Every tensor bit by bit, alpha by value (its dtype may differ), and every text but the hash of the older kind."""
    ours, theirs = load_file(path), load_file(other)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        if key.endswith(".alpha"):
            assert float(tensor) == float(theirs[key])
        else:
            assert theirs[key].dtype == tensor.dtype
            assert torch.equal(theirs[key], tensor), key
    before, after = dict(inspect_weights(path).metadata), dict(inspect_weights(other).metadata)
    for texts in (before, after):
        for key in ("sshs_legacy_hash", "sshs_model_hash", "modelspec.hash_sha256"):
            texts.pop(key, None)
    assert after == before


@pytest.mark.parametrize("by_way_of", ["diffusers", "peft"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kohya_comes_back_exactly_with_convolutions_and_unequal_ranks_and_alphas(
    tmp_path: Path, architecture: str, by_way_of: Target
) -> None:
    path = write_ours(tmp_path / "ink.safetensors", architecture, convolutions=True, uneven=True)
    between = converted(path, by_way_of, tmp_path / ("between.safetensors" if by_way_of == "diffusers" else "between"))
    file, original = open_adapter_file(between), open_adapter_file(path)
    assert (file.spelling, file.architecture, file.ranks) == (by_way_of, architecture, (1, 2))
    assert {name: layer.alpha for name, layer in file.layers.items()} == {
        name: layer.alpha for name, layer in original.layers.items()
    }
    assert_same_file(path, converted(between, "kohya", tmp_path / "back.safetensors"))


def test_the_new_kohya_file_is_taken_by_every_program_also_when_the_old_header_was_bare(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "ink.safetensors", "sdxl")
    bare = rewritten(path, tmp_path / "bare.safetensors", metadata={"format": "pt"})
    assert not all(verdict.ok for verdict in verdicts(open_adapter_file(bare)))
    new = converted(bare, "kohya", tmp_path / "new.safetensors")
    assert all(verdict.ok for verdict in verdicts(open_adapter_file(new)))
    texts = inspect_weights(new).metadata
    assert (texts["ss_base_model_version"], texts["ss_output_name"]) == ("sdxl_base_v1-0", "new")


def test_the_hash_in_the_header_is_that_of_the_new_tensors(tmp_path: Path) -> None:
    import hashlib

    path = converted(write_ours(tmp_path / "ink.safetensors", "sd15"), "kohya", tmp_path / "new.safetensors")
    header = inspect_weights(path)
    assert header.metadata["sshs_model_hash"] == hashlib.sha256(path.read_bytes()[header.data_start :]).hexdigest()


def test_names_of_diffusers_in_a_kohya_file_of_sdxl_become_the_originals(tmp_path: Path) -> None:
    weights = lora_weights("sdxl", text_encoders=False)
    tensors = {}
    for name, lora in weights.items():
        base = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"
        tensors |= {f"{base}.lora_down.weight": lora.lora_A, f"{base}.lora_up.weight": lora.lora_B}
    save_file(tensors, tmp_path / "onetrainer.safetensors")
    new = converted(tmp_path / "onetrainer.safetensors", "kohya", tmp_path / "new.safetensors")
    assert {key.partition(".")[0] for key in load_file(new)} == {kohya_names("sdxl")[name] for name in weights}


def test_rank_stabilised_scale_and_alpha_pattern_become_the_alpha_that_acts(tmp_path: Path) -> None:
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    folder = tmp_path / "adapter" / "unet"
    folder.mkdir(parents=True)
    names = [f"{path}.to_q", f"{path}.to_k"]
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.randn(4, 1280) for name in names}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.randn(1280, 4) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {f"{path}.to_k": 10}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = load_file(converted(folder.parent, "kohya", tmp_path / "new.safetensors"))
    alphas = {key.removesuffix(".alpha")[-4:]: float(value) for key, value in found.items() if key.endswith("alpha")}
    assert alphas == {"to_q": 12.0, "to_k": 20.0}  # alpha * sqrt(4); alpha / 4 is then the scale alpha / sqrt(4)


def test_dora_goes_to_peft_and_back_exactly_also_of_a_convolution(tmp_path: Path) -> None:
    shapes = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (1280, 1280),
        "lora_unet_mid_block_resnets_0_conv1": (1280, 1280, 3, 3),
    }
    tensors = {}
    for name, shape in shapes.items():
        ones = [1] * (len(shape) - 2)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, *shape[1:])
        tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], 2, *ones)
        tensors[f"{name}.dora_scale"] = torch.rand(shape[0], *[1] * (len(shape) - 1))
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
    path = tmp_path / "dora.safetensors"
    save_file(tensors, path, {"ss_base_model_version": "sd_v1", "ss_v2": "False"})
    between = converted(path, "peft", tmp_path / "peft")
    assert json.loads((between / "unet" / "adapter_config.json").read_text())["use_dora"] is True
    back = converted(between, "kohya", tmp_path / "back.safetensors")
    assert {key: value.shape for key, value in load_file(back).items()} == {k: v.shape for k, v in tensors.items()}
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(back).items())


def lycoris_file(path: Path) -> Path:
    name = kohya_names("sdxl")["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
    te2 = kohya_names("sdxl")["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"]
    parts = {
        name: {"lokr_w1": (4, 4), "lokr_w2_a": (160, 2), "lokr_w2_b": (2, 160)},
        te2: {"lokr_w1": (4, 4), "lokr_w2_a": (320, 2), "lokr_w2_b": (2, 320)},
    }
    tensors = {f"{base}.{part}": torch.randn(shape) for base, of in parts.items() for part, shape in of.items()}
    tensors |= {f"{base}.alpha": torch.tensor(1.0) for base in parts}
    save_file(tensors, path)
    return path


def test_other_kinds_stay_as_they_are_in_a_kohya_file_and_are_refused_elsewhere(tmp_path: Path) -> None:
    path = lycoris_file(tmp_path / "a.safetensors")
    new = load_file(converted(path, "kohya", tmp_path / "new.safetensors"))
    assert all(torch.equal(new[key], value) for key, value in load_file(path).items())
    with pytest.raises(ModelError, match="is a LoKr, which a diffusers file has no place for"):
        converted(path, "diffusers", tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_a_language_models_lora_and_a_flux_lora_are_refused_with_the_way_on(tmp_path: Path) -> None:
    pair = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2)}
    for name, text in {
        "base_model.model.model.layers.0.self_attn.q_proj": "for a language model.*lora-scripts export",
        "transformer.single_transformer_blocks.0.attn.to_q": "is for Flux",
    }.items():
        save_file({f"{name}.{part}": value for part, value in pair.items()}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}')
        with pytest.raises(ModelError, match=text):
            converted(tmp_path / "adapter_model.safetensors", "kohya", tmp_path / "no.safetensors")


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    big = {f"layer{number}": torch.randn(500, 1000) for number in range(8)}  # 2 MB each, 16 MB in all
    save_file(big, tmp_path / "a.safetensors")
    header = inspect_weights(tmp_path / "a.safetensors")
    copies = [CopiedTensor(f"new.{key}", "F32", (1000, 500), (header, key)) for key in big]
    peak = allocated_peak(lambda: write_copies(tmp_path / "b.safetensors", copies, {}))
    assert peak < 1.1 * 2_000_000
    assert torch.equal(load_file(tmp_path / "b.safetensors")["new.layer3"], big["layer3"].reshape(1000, 500))


def test_command_converts_says_who_reads_it_and_keeps_older_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_ours(tmp_path / "ink.safetensors", "sd15")
    words = ["convert", str(path), "--to", "diffusers", "--output", str(tmp_path / "new.safetensors")]
    assert main(words) == 0
    assert "Read by diffusers" in capsys.readouterr().out
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    assert main([*words[:-1], str(path)]) == 2
    assert main([*words[:3], "peft", "--output", str(tmp_path / "folder")]) == 0
    assert (tmp_path / "folder" / "text_encoder" / "adapter_config.json").is_file()
    assert main([*words[:3], "peft", "--output", str(tmp_path / "folder")]) == 2
