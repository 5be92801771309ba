"""The rules of vLLM, and the readers of what is written for llama.cpp and mlx-lm: what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_causal_lms import random_lora, save_tiny, tiny_model
from lora_scripts.errors import ExportError, ModelError
from lora_scripts.export.gguf_adapter import read_gguf_adapter, write_gguf_adapter
from lora_scripts.export.language_base import LanguageBase, open_base
from lora_scripts.export.mlx import read_mlx_folder, write_mlx_folder
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.vllm import vllm_faults

GOOD = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj"], "bias": "none", "init_lora_weights": True}
KEYS = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 12}, "r is 12"),
        ({"lora_alpha": 12.0}, "lora_alpha is 12.0, which is no integer"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "whole layers"),
        ({"bias": "all"}, "biases are trained"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
    ],
)
def test_each_rule_of_vllm_has_its_line(change: dict[str, Any], words: str) -> None:
    assert vllm_faults(GOOD, KEYS) == []
    [fault] = vllm_faults({**GOOD, **change}, KEYS)
    assert words in fault


def test_tensors_that_are_no_lora_are_named() -> None:
    [fault] = vllm_faults(GOOD, [*KEYS, "base_model.model.lm_head.weight"])
    assert "1 tensors are no lora_A or lora_B, base_model.model.lm_head.weight among them" in fault


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LanguageBase:
    return open_base(str(save_tiny(tmp_path_factory.mktemp("base"))))


SHAPES = layer_shapes({"language_model": tiny_model("llama")})


def test_gguf_read_back_is_what_was_written(base: LanguageBase, tmp_path: Path) -> None:
    weights = random_lora(tiny_model("llama"))
    write_gguf_adapter(tmp_path / "a.gguf", weights, base, "a", torch.float32)
    read = read_gguf_adapter(tmp_path / "a.gguf", base, SHAPES)
    assert read.keys() == weights.keys()
    for layer, lora in weights.items():
        assert torch.equal(read[layer].lora_A, lora.lora_A)
        assert torch.equal(read[layer].lora_B, lora.lora_B)
        assert read[layer].alpha == lora.alpha


def test_gguf_keeps_half_precision(base: LanguageBase, tmp_path: Path) -> None:
    write_gguf_adapter(tmp_path / "a.gguf", random_lora(tiny_model("llama")), base, "a", torch.float16)
    assert {tensor.data.dtype.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors} == {"float16"}


def test_damaged_and_foreign_gguf_files_are_refused(base: LanguageBase, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(ModelError, match="no such file"):
        read_gguf_adapter(path, base, SHAPES)
    write_gguf_adapter(path, random_lora(tiny_model("llama")), base, "a", torch.float32)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="is no whole GGUF file"):
        read_gguf_adapter(path, base, SHAPES)
    path.write_bytes(whole.replace(b"adapter.type", b"adapter.typo"))
    with pytest.raises(ModelError, match="but no LoRA adapter"):
        read_gguf_adapter(path, base, SHAPES)
    path.write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_op"))
    with pytest.raises(ModelError, match=r"2 of its tensors are not in this model, blk\.1\.ffn_op"):
        read_gguf_adapter(path, base, SHAPES)


def test_a_gguf_file_of_another_architecture_is_refused(base: LanguageBase, tmp_path: Path) -> None:
    other = open_base(str(save_tiny(tmp_path / "qwen", "qwen2")))
    write_gguf_adapter(tmp_path / "a.gguf", random_lora(tiny_model("qwen2")), other, "a", torch.float32)
    with pytest.raises(ModelError, match="was made for a qwen2 model, the base is a llama model"):
        read_gguf_adapter(tmp_path / "a.gguf", base, SHAPES)


def test_a_failed_write_leaves_the_older_gguf_file(
    base: LanguageBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"the older file")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ExportError, match="no room left on the disk"):
        write_gguf_adapter(path, random_lora(tiny_model("llama")), base, "a", torch.float32)
    assert path.read_bytes() == b"the older file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]


def test_mlx_read_back_is_what_was_written(base: LanguageBase, tmp_path: Path) -> None:
    weights = random_lora(tiny_model("llama"))
    read = read_mlx_folder(write_mlx_folder(tmp_path / "a", weights, base, torch.float32), SHAPES)
    assert read.keys() == weights.keys()
    for layer, lora in weights.items():
        assert torch.equal(read[layer].lora_A, lora.lora_A)
        assert torch.equal(read[layer].lora_B, lora.lora_B)
        assert read[layer].scale == lora.scale


def test_damaged_and_foreign_mlx_folders_are_refused(base: LanguageBase, tmp_path: Path) -> None:
    folder = write_mlx_folder(tmp_path / "a", random_lora(tiny_model("llama")), base, torch.float32)
    path, settings = folder / "adapters.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(path), json.loads(settings.read_text())
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith("1.mlp.up_proj.lora_a")}, path)
    with pytest.raises(ModelError, match="is no part of a LoRA for this base model"):
        read_mlx_folder(folder, SHAPES)
    save_file({key: tensor[:3].contiguous() for key, tensor in tensors.items()}, path)
    with pytest.raises(ModelError, match="does not fit this base model or the rank 4"):
        read_mlx_folder(folder, SHAPES)
    settings.write_text(json.dumps({**config, "fine_tune_type": "dora"}))
    with pytest.raises(ModelError, match=r"not a plain LoRA of mlx-lm \(dora\)"):
        read_mlx_folder(folder, SHAPES)
    settings.write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(ModelError, match=r"is no adapter_config\.json of mlx-lm"):
        read_mlx_folder(folder, SHAPES)


def test_a_head_is_nothing_that_mlx_lm_puts_a_lora_on(base: LanguageBase, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="lm_head lies outside the blocks"):
        write_mlx_folder(tmp_path / "a", random_lora(tiny_model("llama"), head=True), base, torch.float32)
    assert not (tmp_path / "a").exists()
