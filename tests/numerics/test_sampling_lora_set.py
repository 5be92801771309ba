"""LoRAs applied for rendering: the effect of W + weight * delta, and a model untouched afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_scripts.errors import ModelError
from lora_scripts.export.writer import write_lora
from lora_scripts.models.stable_diffusion import StableDiffusionParts
from lora_scripts.sampling.denoise import noise_prediction
from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA
from unit.sampling.tiny_sd import merge, pipeline, random_lora, tiny_parts


def probe(parts: StableDiffusionParts) -> torch.Tensor:
    return noise_prediction(parts, "a red fox", "cpu", width=32, height=32)


def components(parts: StableDiffusionParts) -> dict:
    return {"unet": parts.unet, "text_encoder": parts.text_encoder}


def part(weights: dict, component: str) -> dict:
    return {name: lora for name, lora in weights.items() if name.startswith(f"{component}.")}


def assert_same_change(found: torch.Tensor, expected: torch.Tensor) -> None:
    base = probe(tiny_parts())
    assert (expected - base).abs().max() > 0.05
    assert (found - expected).norm() < 1e-4 * (expected - base).norm()


@pytest.mark.parametrize("linear_projection", [False, True])
def test_one_lora_changes_the_output_as_merged_by_hand(linear_projection: bool) -> None:
    parts, merged = (tiny_parts(linear_projection=linear_projection) for _ in range(2))
    weights = random_lora(parts)
    merge(merged, weights, 0.7)
    with LoRASet(components(parts), [WeightedLoRA(weights, 0.7, 0.7)]):
        found = probe(parts)
    assert (found - probe(merged)).norm() < 1e-4 * (probe(merged) - probe(parts)).norm()


def test_several_loras_with_unet_and_text_encoder_weights_apart_add_up() -> None:
    parts, merged = tiny_parts(), tiny_parts()
    first = random_lora(parts, rank=3, alpha=5.0, seed=1)
    second = random_lora(parts, rank=2, alpha=1.0, seed=2, targets=("to_q", "proj_in", "q_proj", "fc1"))
    merge(merged, part(first, "unet"), 0.5)
    merge(merged, part(first, "text_encoder"), -0.3)
    merge(merged, second, 0.8)
    loras = [WeightedLoRA(first, 0.5, -0.3), WeightedLoRA(second, 0.8, 0.8)]
    with LoRASet(components(parts), loras):
        assert_same_change(probe(parts), probe(merged))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's word on every second LoRA
def test_effect_is_that_of_the_file_in_diffusers_at_the_same_weights(tmp_path: Path) -> None:
    parts, theirs = tiny_parts(), tiny_parts()
    loras = [random_lora(parts, seed=1), random_lora(parts, rank=2, seed=2)]
    pipe = pipeline(theirs)
    for number, weights in enumerate(loras):
        write_lora(tmp_path / f"{number}.safetensors", weights, {}, torch.float32)
        pipe.load_lora_weights(str(tmp_path / f"{number}.safetensors"), adapter_name=f"lora{number}")
    pipe.set_adapters(["lora0", "lora1"], adapter_weights=[0.7, 0.4])
    with LoRASet(components(parts), [WeightedLoRA(loras[0], 0.7, 0.7), WeightedLoRA(loras[1], 0.4, 0.4)]):
        assert_same_change(probe(parts), probe(theirs))


def test_model_is_the_same_bit_by_bit_afterwards() -> None:
    parts = tiny_parts()
    before = {name: t.clone() for module in (parts.unet, parts.text_encoder) for name, t in module.state_dict().items()}
    base = probe(parts)
    lora_set = LoRASet(components(parts), [WeightedLoRA(random_lora(parts))])
    assert not torch.equal(probe(parts), base)
    lora_set.remove()
    assert torch.equal(probe(parts), base)
    after = {name: t for module in (parts.unet, parts.text_encoder) for name, t in module.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after.keys() == before.keys()
    assert not any(module._forward_hooks for module in parts.unet.modules())


def test_applying_again_replaces_what_was_there() -> None:
    parts, merged = tiny_parts(), tiny_parts()
    second = random_lora(parts, seed=2)
    merge(merged, second)
    lora_set = LoRASet(components(parts), [WeightedLoRA(random_lora(parts, seed=1))])
    lora_set.apply([WeightedLoRA(second)])
    assert_same_change(probe(parts), probe(merged))
    lora_set.apply([])
    assert torch.equal(probe(parts), probe(tiny_parts()))


def test_weight_zero_costs_nothing() -> None:
    parts = tiny_parts()
    LoRASet(components(parts), [WeightedLoRA(random_lora(parts), 0.0, 0.0)])
    assert not any(module._forward_hooks for module in parts.unet.modules())


def test_lora_of_another_model_is_refused_and_nothing_stays() -> None:
    parts = tiny_parts()
    weights = {**random_lora(parts), "unet.no_such_layer": random_lora(parts).popitem()[1]}
    with pytest.raises(ModelError, match=r"1 layers of the LoRA are not in this model, unet\.no_such_layer"):
        LoRASet(components(parts), [WeightedLoRA(weights)])
    assert torch.equal(probe(parts), probe(tiny_parts()))


def test_half_precision_model_takes_single_precision_lora() -> None:
    parts, merged = tiny_parts(), tiny_parts()
    weights = random_lora(parts)
    merge(merged, weights)
    for module in components(parts).values():
        module.to(torch.bfloat16)
    with LoRASet(components(parts), [WeightedLoRA(weights)]):
        found = probe(parts)
    assert found.dtype == torch.bfloat16
    change = probe(merged) - probe(tiny_parts())
    assert (found.float() - probe(merged)).norm() < 0.2 * change.norm()
