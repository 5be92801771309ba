"""The PEFT folder of a language model: what stands in it, what the reader takes, what both refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.tiny_causal_lms import TEMPLATE, random_lora, save_tiny, tiny_model
from lora_scripts.adapters.weights import LoRAWeights
from lora_scripts.errors import ExportError, ModelError
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.peft_folder import base_reference, write_peft_folder
from lora_scripts.export.reader import read_lora_file

LAYER = "language_model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def weights() -> LoRAWeights:
    return random_lora(tiny_model("llama"))


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return layer_shapes({"language_model": tiny_model("llama")})


@pytest.fixture
def folder(tmp_path: Path, weights: LoRAWeights) -> Path:
    return write_peft_folder(tmp_path / "polite", weights, "some/base", torch.float32)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_config_holds_every_key_that_a_loader_needs(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "base_model_name_or_path": "some/base",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    assert {key: config[key] for key in expected} == expected
    assert type(config["lora_alpha"]) is int
    assert config["target_modules"] == sorted(config["target_modules"])


def test_keys_and_header_are_pefts(folder: Path, weights: LoRAWeights) -> None:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(weights)
    down = tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"]
    up = tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    assert (tuple(down.shape), tuple(up.shape)) == ((4, 32), (16, 4))


def test_the_same_weights_give_the_same_bytes(tmp_path: Path, folder: Path, weights: LoRAWeights) -> None:
    again = write_peft_folder(tmp_path / "again", dict(reversed(weights.items())), "some/base", torch.float32)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_last_names_stand_for_layers_only_where_they_mean_exactly_these(
    tmp_path: Path, weights: LoRAWeights, shapes: dict[str, tuple[int, ...]]
) -> None:
    def targets(name: str, some: LoRAWeights) -> list[str]:
        path = write_peft_folder(tmp_path / name, some, "b", torch.float32, model_layers=shapes)
        return list(json.loads((path / "adapter_config.json").read_text())["target_modules"])

    assert targets("all", weights) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    first = {layer: lora for layer, lora in weights.items() if ".0.self_attn.q" in layer}
    assert targets("first", first) == ["model.layers.0.self_attn.q_proj"]


def test_read_back_gives_the_weights_that_were_written(
    folder: Path, weights: LoRAWeights, shapes: dict[str, tuple[int, ...]]
) -> None:
    for found in (read_lora_file(folder, shapes), read_lora_file(folder)):
        assert (found.format, found.name) == ("peft", "polite")
        assert set(found.weights) == set(weights)
        for layer, lora in weights.items():
            assert torch.equal(found.weights[layer].lora_A, lora.lora_A)
            assert torch.equal(found.weights[layer].lora_B, lora.lora_B)
            assert found.weights[layer].alpha == 6.0


def test_tokenizer_template_and_card_lie_beside_the_weights(tmp_path: Path, weights: LoRAWeights) -> None:
    base = save_tiny(tmp_path / "base")
    folder = write_peft_folder(tmp_path / "a", weights, base, torch.float16, tokenizer=base, card="# polite\n")
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (folder / "README.md").read_text() == "# polite\n"
    assert not (folder / "model.safetensors").exists()


def test_base_is_named_so_that_peft_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_reference("base") == str(tmp_path / "base")
    assert base_reference("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert Path(base_reference("builtin:mini-sd")).is_dir()


def test_a_folder_with_files_is_never_written_over_unasked(tmp_path: Path, weights: LoRAWeights) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "diary.txt").write_text("mine")
    with pytest.raises(ExportError, match="is there already and holds files"):
        write_peft_folder(taken, weights, "b", torch.float32)
    assert (taken / "diary.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_replaced_on_request_holds_only_the_new_files(folder: Path, weights: LoRAWeights) -> None:
    (folder / "README.md").write_text("of the run before")
    write_peft_folder(folder, weights, "b", torch.float32, replace=True)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["polite"]


def test_a_failed_write_leaves_the_older_folder(
    folder: Path, weights: LoRAWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ExportError, match="no room left on the disk"):
        write_peft_folder(folder, weights, "b", torch.float16, replace=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["polite"]


def test_uneven_ranks_or_alphas_are_refused_with_the_way_on(tmp_path: Path, weights: LoRAWeights) -> None:
    wider = replace(weights[LAYER], lora_A=torch.ones(8, 32), lora_B=torch.ones(32, 8))
    for other in (wider, replace(weights[LAYER], alpha=3.0)):
        with pytest.raises(ExportError, match=r"not plain LoRA .* bake it first"):
            write_peft_folder(tmp_path / "a", {**weights, LAYER: other}, "b", torch.float32)
    uneven = {LAYER: replace(weights[LAYER], alpha=2.5)}
    with pytest.raises(ExportError, match=r"alphas 2\.5"):
        write_peft_folder(tmp_path / "a", uneven, "b", torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path, weights: LoRAWeights) -> None:
    huge = {LAYER: replace(weights[LAYER], lora_B=torch.full((32, 4), 1e6))}
    with pytest.raises(ExportError, match="too large for float16"):
        write_peft_folder(tmp_path / "a", huge, "b", torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_a_picture_model_are_refused(tmp_path: Path, weights: LoRAWeights) -> None:
    with pytest.raises(ExportError, match="is no linear layer of a language model"):
        write_peft_folder(tmp_path / "a", {"unet.to_q": weights[LAYER]}, "b", torch.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "started with pissa_niter_4"),
        ({"lora_alpha": "much"}, "are not numbers"),
    ],
)
def test_other_adapters_are_refused_by_kind(folder: Path, change: dict[str, object], words: str) -> None:
    change_config(folder, **change)
    with pytest.raises(ModelError, match=words):
        read_lora_file(folder)


def test_damaged_folders_are_refused_with_the_reason(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    weights_file = folder / "adapter_model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="half a download"):
        read_lora_file(folder, shapes)
    tensors = load_file_bytes(whole)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, weights_file)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj lacks its up matrix"):
        read_lora_file(folder, shapes)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        read_lora_file(folder, shapes)


def load_file_bytes(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return dict(load(data))


def test_folders_of_other_models_are_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    fewer = layer_shapes({"language_model": tiny_model("llama", num_hidden_layers=1)})
    with pytest.raises(ModelError, match=r"7 of 14 layers are not in this model.*made for another language model"):
        read_lora_file(folder, fewer)
    wider = layer_shapes({"language_model": tiny_model("llama", hidden_size=64)})
    with pytest.raises(ModelError, match=r"this model's layer is .* made for another base model"):
        read_lora_file(folder, wider)
    kohya = {
        f"lora_unet_mid_block_attentions_0_proj_in.{part}.weight": torch.ones(4, 4) for part in ("lora_down", "lora_up")
    }
    save_file(kohya, tmp_path / "ink.safetensors")
    with pytest.raises(ModelError, match="LoRA for a picture model; this base model is a language model"):
        read_lora_file(tmp_path / "ink.safetensors", fewer)
    with pytest.raises(ModelError, match="LoRA for a language model"):
        read_lora_file(folder, {"unet.mid_block.attentions.0.proj_in": (4, 4)})
