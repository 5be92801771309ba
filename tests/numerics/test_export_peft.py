"""A PEFT folder against PEFT itself, and the proof that finds what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_causal_lms import KINDS, logits_with, probe, random_lora, save_tiny, tiny_model
from lora_scripts.errors import ExportError
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.peft_folder import write_peft_folder
from lora_scripts.export.verify_peft import applied_folder, verify_folder, verify_folder_effect

LAYER = "language_model.model.layers.1.mlp.down_proj"


def through_peft(base: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = PeftModel.from_pretrained(model, folder).eval()(probe()).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short", [True, False], ids=["last names", "whole paths"])
def test_peft_loads_the_folder_with_the_same_logits(kind: str, short: bool, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", kind)
    model = tiny_model(kind)
    weights = random_lora(model, rank=4, alpha=6.0)
    layers = layer_shapes({"language_model": model}) if short else None
    folder = write_peft_folder(tmp_path / "lora", weights, base, torch.float32, tokenizer=base, model_layers=layers)
    expected = logits_with(model, weights)
    assert (expected - logits_with(model, {})).abs().max() > 0.1
    torch.testing.assert_close(through_peft(base, folder), expected, atol=1e-4, rtol=0)


def test_peft_finds_the_base_from_the_folder_alone(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    base = save_tiny(tmp_path / "base")
    model = tiny_model("llama")
    weights = random_lora(model)
    folder = write_peft_folder(tmp_path / "lora", weights, base, torch.float32, tokenizer=base)
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(probe()).logits, logits_with(model, weights), atol=1e-4, rtol=0)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def weights(model: Any) -> Mapping[str, Any]:
    return random_lora(model)


@pytest.fixture
def folder(tmp_path: Path, weights: Mapping[str, Any]) -> Path:
    return write_peft_folder(tmp_path / "lora", weights, "base", torch.float32)


def test_a_good_folder_is_proved_tensor_by_tensor(folder: Path, weights: Mapping[str, Any]) -> None:
    found = verify_folder(folder, weights)
    assert (found.num_layers, found.num_tensors, found.dtype) == (14, 28, "F32")
    assert found.relative_error == 0.0
    assert "lora: read back, 28 of 28 tensors in 14 layers matched" in str(found)


def test_rounding_to_half_is_accepted_and_told(tmp_path: Path, weights: Mapping[str, Any]) -> None:
    folder = write_peft_folder(tmp_path / "half", weights, "base", torch.bfloat16)
    assert 1e-4 < verify_folder(folder, weights).relative_error < 1e-2


def change_tensors(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY), "1 of 28 keys are missing"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "1 keys belong to no trained layer"),
        (lambda t: t.update({KEY: t[KEY] * 1.01}), "differ from the trained ones"),
        (lambda t: t.update({KEY: t[KEY] / 0}), "not finite"),
        (lambda t: t.update({KEY: t[KEY][:5].clone()}), "was trained"),
    ],
)
def test_changed_tensors_are_found(folder: Path, weights: Mapping[str, Any], change: Any, words: str) -> None:
    change_tensors(folder, change)
    with pytest.raises(ExportError, match=words):
        verify_folder(folder, weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": 4}, "lora_alpha is 4 in the file, 6 was trained"),
        ({"lora_alpha": 6.0}, "not those of plain LoRA"),
        ({"r": 8}, "r is 8 in the settings, 4 was trained"),
        ({"use_rslora": True}, r"not those of plain LoRA with a whole alpha \['use_rslora'\]"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"target_modules": ["q_proj"]}, "so PEFT would leave it out"),
    ],
)
def test_settings_that_make_another_adapter_are_found(
    folder: Path, weights: Mapping[str, Any], change: dict[str, Any], words: str
) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ExportError, match=words):
        verify_folder(folder, weights)


def test_the_effect_is_compared_with_the_trained_one(folder: Path, model: Any, weights: Mapping[str, Any]) -> None:
    trained = logits_with(model, weights)
    effect = verify_folder_effect(folder, model, lambda: model(probe()).logits, trained)
    assert effect.conclusive
    assert effect.largest_difference < 1e-4
    other = logits_with(model, {**weights, LAYER: replace(weights[LAYER], alpha=-30.0)})
    with pytest.raises(ExportError, match="otherwise than the trained adapter"):
        verify_folder_effect(folder, model, lambda: model(probe()).logits, other)


def test_the_adapter_is_gone_after_the_comparison(folder: Path, model: Any) -> None:
    before = logits_with(model, {})
    with applied_folder(folder, model):
        assert not torch.equal(logits_with(model, {}), before)
    assert torch.equal(logits_with(model, {}), before)
