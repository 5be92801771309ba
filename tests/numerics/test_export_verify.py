"""The check of a finished file: a good one passes with the numbers right, each fault is found and called failed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_scripts.errors import ExportError
from lora_scripts.export.verify import applied_file, verify_effect, verify_file
from lora_scripts.export.writer import write_lora
from lora_scripts.sampling.denoise import noise_prediction
from unit.sampling.tiny_sd import merge, random_lora, tiny_parts

probe = partial(noise_prediction, prompt="a red fox", device="cpu", width=32, height=32)


@pytest.fixture
def weights() -> dict:
    return random_lora(tiny_parts(), rank=3, alpha=5.0)


@pytest.fixture
def path(tmp_path: Path, weights: dict) -> Path:
    write_lora(tmp_path / "ink.safetensors", weights, {"ss_v2": "False"}, torch.float16)
    return tmp_path / "ink.safetensors"


def edit(path: Path, **changes: object) -> None:
    """Changes tensors whose name ends as given, in the file."""
    tensors = load_file(path)
    for ending, change in changes.items():
        key = next(key for key in tensors if key.endswith(ending.replace("__", ".")))
        tensors[key] = change(tensors[key])  # type: ignore[operator]
    save_file(tensors, path)


def test_good_file_passes_and_its_numbers_are_told(path: Path, weights: dict) -> None:
    found = verify_file(path, weights)
    assert (found.num_layers, found.num_tensors, found.num_zero_layers) == (len(weights), 3 * len(weights), 0)
    assert found.num_parameters == sum(lora.lora_A.numel() + lora.lora_B.numel() for lora in weights.values())
    assert (found.dtype, found.metadata["ss_v2"]) == ("F16", "False")
    assert "matched, all finite" in str(found)


def test_relative_error_is_that_of_the_full_weight_changes(path: Path, weights: dict) -> None:
    stored = {
        name: replace(lora, lora_A=lora.lora_A.half(), lora_B=lora.lora_B.half()) for name, lora in weights.items()
    }
    error = sum(float((stored[name].delta() - lora.delta()).double().square().sum()) for name, lora in weights.items())
    size = sum(float(lora.delta().double().square().sum()) for lora in weights.values())
    assert verify_file(path, weights).relative_error == pytest.approx((error / size) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_pass_within_their_own_rounding(tmp_path: Path, weights: dict, dtype: torch.dtype) -> None:
    write_lora(tmp_path / "a.safetensors", weights, {}, dtype)
    found = verify_file(tmp_path / "a.safetensors", weights)
    assert found.relative_error < (1e-7 if dtype == torch.float32 else 1e-2)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"to_q__alpha": lambda t: t * 2}, r"alpha is 10 in the file, 5 was trained"),
        ({"to_q__lora_up__weight": lambda t: t * 1.5}, r"differ from the trained ones by"),
        ({"to_q__lora_down__weight": lambda t: t * float("nan")}, r"not finite"),
        ({"to_q__lora_down__weight": lambda t: t[:2].clone()}, r"is \[2, 8\] in the file, \[3, 8\] was trained"),
        ({"proj_in__lora_up__weight": lambda t: t[:, :, 0, 0].clone()}, r"was trained"),
    ],
)
def test_each_changed_tensor_is_found_and_called_failed(path: Path, weights: dict, changes: dict, text: str) -> None:
    edit(path, **changes)
    with pytest.raises(ExportError, match=f"failed.*{text}"):
        verify_file(path, weights)


@pytest.mark.fault(28)
def test_missing_and_strange_keys_are_found(path: Path, weights: dict) -> None:
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(".alpha"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(ExportError, match=rf"failed: 1 of {len(tensors)} keys are missing, {name}"):
        verify_file(path, weights)
    save_file({**tensors, "lora_unet_mid.weight": torch.ones(1)}, path)
    with pytest.raises(ExportError, match=r"failed: 1 keys belong to no trained layer, lora_unet_mid\.weight"):
        verify_file(path, weights)


@pytest.mark.fault(28)
def test_lora_that_changes_nothing_is_a_failure(tmp_path: Path, weights: dict) -> None:
    zero = {name: replace(lora, lora_B=torch.zeros_like(lora.lora_B)) for name, lora in weights.items()}
    write_lora(tmp_path / "a.safetensors", zero, {}, torch.float16)
    with pytest.raises(ExportError, match="failed: the LoRA changes nothing"):
        verify_file(tmp_path / "a.safetensors", zero)


@pytest.mark.fault(28)
def test_training_lost_in_fp16_is_a_failure_and_fp32_keeps_it(tmp_path: Path, weights: dict) -> None:
    small = {name: replace(lora, lora_B=lora.lora_B * 3e-8) for name, lora in weights.items()}
    write_lora(tmp_path / "half.safetensors", small, {}, torch.float16)
    with pytest.raises(ExportError, match=r"failed.*save_precision to fp32"):
        verify_file(tmp_path / "half.safetensors", small)
    write_lora(tmp_path / "full.safetensors", small, {}, torch.float32)
    assert verify_file(tmp_path / "full.safetensors", small).relative_error < 1e-7


@pytest.mark.fault(28)
@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"\0" * len(data), lambda data: b""])
def test_file_that_cannot_be_read_back_is_a_failure(path: Path, weights: dict, damage) -> None:
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ExportError, match="failed: the finished file cannot be read back"):
        verify_file(path, weights)


def test_layers_that_stayed_zero_are_counted(tmp_path: Path, weights: dict) -> None:
    some = {
        name: replace(lora, lora_B=torch.zeros_like(lora.lora_B)) if name.startswith("text_encoder.") else lora
        for name, lora in weights.items()
    }
    write_lora(tmp_path / "a.safetensors", some, {}, torch.float16)
    zero = verify_file(tmp_path / "a.safetensors", some).num_zero_layers
    assert zero == sum(name.startswith("text_encoder.") for name in weights)


def trained_output(weights: dict) -> torch.Tensor:
    merged = tiny_parts()
    merge(merged, weights)
    return probe(merged)


def components(parts) -> dict:
    return {"unet": parts.unet, "text_encoder": parts.text_encoder}


def test_effect_of_the_file_is_that_of_the_trained_weights(path: Path, weights: dict) -> None:
    parts = tiny_parts()
    effect = verify_effect(path, components(parts), lambda: probe(parts), trained_output(weights))
    assert effect.conclusive
    assert effect.relative_difference < 5e-3
    assert effect.file_change == pytest.approx(effect.trained_change, rel=1e-2)
    assert "as the training did" in str(effect)


def test_effect_is_compared_beside_a_peft_adapter_that_is_switched_off(path: Path, weights: dict) -> None:
    from peft import LoraConfig

    parts = tiny_parts()
    parts.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_in"], init_lora_weights=False))
    parts.unet.disable_adapters()
    effect = verify_effect(path, components(parts), lambda: probe(parts), trained_output(weights))
    assert effect.relative_difference < 5e-3


@pytest.mark.fault(28)
def test_file_with_another_effect_is_a_failure(path: Path, weights: dict) -> None:
    parts = tiny_parts()
    edit(path, attn1_to_v__lora_up__weight=lambda t: -t)
    with pytest.raises(ExportError, match="failed: the file changes the model's output otherwise"):
        verify_effect(path, components(parts), lambda: probe(parts), trained_output(weights))


@pytest.mark.fault(28)
def test_file_without_effect_is_a_failure(path: Path, weights: dict) -> None:
    parts = tiny_parts()
    save_file({key: t * 0 if key.endswith("up.weight") else t for key, t in load_file(path).items()}, path)
    with pytest.raises(ExportError, match="failed: the file changes nothing"):
        verify_effect(path, components(parts), lambda: probe(parts), trained_output(weights))


def test_change_below_the_rounding_is_called_inconclusive(tmp_path: Path, weights: dict) -> None:
    small = {name: replace(lora, lora_B=lora.lora_B * 1e-8) for name, lora in weights.items()}
    write_lora(tmp_path / "a.safetensors", small, {}, torch.float32)
    parts = tiny_parts()
    effect = verify_effect(tmp_path / "a.safetensors", components(parts), lambda: probe(parts), trained_output(small))
    assert not effect.conclusive
    assert "too small to compare" in str(effect)


def test_model_is_untouched_after_the_comparison(path: Path) -> None:
    parts = tiny_parts()
    before = probe(parts)
    with applied_file(path, components(parts)):
        assert not torch.equal(probe(parts), before)
    assert torch.equal(probe(parts), before)


@pytest.mark.fault(28)
def test_file_of_another_model_is_a_failure(path: Path) -> None:
    parts = tiny_parts()
    with (
        pytest.raises(ExportError, match=r"failed: lora_te_.* is no layer of the model"),
        applied_file(path, {"unet": parts.unet}),
    ):
        pass
    assert not any(module._forward_hooks for module in parts.unet.modules())
