"""Our files in diffusers: every key matched, the same change of UNet and text encoder as W + delta by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_scripts.export.diffusers import to_diffusers
from lora_scripts.export.kohya import read_lora_file
from lora_scripts.export.metadata import RunFacts, file_metadata
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.writer import write_lora
from lora_scripts.models.stable_diffusion import StableDiffusionParts
from unit.sampling.tiny_sd import merge, pipeline, random_lora, tiny_parts

FACTS = RunFacts("ink", "sd_v1", "stable-diffusion-v1/lora", rank=3, alpha=5.0)


@contextmanager
def no_log_warnings() -> Iterator[None]:
    """Fails when diffusers, transformers or PEFT log a warning meanwhile; they print instead of warning."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def outputs(parts: StableDiffusionParts, prompt: str = "a red fox in the snow") -> tuple[torch.Tensor, torch.Tensor]:
    """Text embeddings, and the UNet's output for them."""
    ids = parts.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        embeds = parts.text_encoder(ids).last_hidden_state
        return embeds, parts.unet(latents, torch.tensor([10, 900]), embeds.expand(2, -1, -1), return_dict=False)[0]


def loaded_layers(parts: StableDiffusionParts) -> set[str]:
    """Layers that diffusers has given an adapter."""
    return {
        f"{component}.{name}"
        for component in ("unet", "text_encoder")
        for name, module in getattr(parts, component).named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }


def assert_same_effect(path: Path, weights: dict, make: dict | None = None) -> None:
    plain, by_hand, loaded = (tiny_parts(**(make or {})) for _ in range(3))
    merge(by_hand, weights)
    with no_log_warnings():
        pipeline(loaded).load_lora_weights(str(path))
    assert loaded_layers(loaded) == set(weights)
    for ours, theirs, base in zip(outputs(by_hand), outputs(loaded), outputs(plain), strict=True):
        assert (ours - base).abs().max() > 0.05  # there is an effect to compare
        assert (theirs - ours).norm() < 1e-5 * (ours - base).norm()


@pytest.mark.parametrize("linear_projection", [False, True], ids=["conv proj_in (SD 1)", "linear proj_in (SD 2)"])
def test_kohya_file_loads_in_diffusers_with_same_output(tmp_path: Path, linear_projection: bool) -> None:
    make = {"linear_projection": linear_projection}
    weights = random_lora(tiny_parts(**make), rank=3, alpha=5.0)
    assert weights["unet.down_blocks.0.attentions.0.proj_in"].lora_A.ndim == (2 if linear_projection else 4)
    path = tmp_path / "ink.safetensors"
    write_lora(path, weights, file_metadata(FACTS), torch.float32)
    assert_same_effect(path, weights, make)


def test_kohya_file_of_the_unet_alone_loads_in_diffusers_with_same_output(tmp_path: Path) -> None:
    weights = random_lora(tiny_parts(), components=("unet",))
    path = tmp_path / "unet.safetensors"
    write_lora(path, weights, {}, torch.float32)
    plain, by_hand, loaded = tiny_parts(), tiny_parts(), tiny_parts()
    merge(by_hand, weights)
    pipeline(loaded).load_lora_weights(str(path))
    torch.testing.assert_close(outputs(loaded)[1], outputs(by_hand)[1], rtol=1e-5, atol=1e-5)
    assert (outputs(plain)[1] - outputs(by_hand)[1]).abs().max() > 0.05


def test_fp16_kohya_file_changes_the_output_as_trained_within_fp16(tmp_path: Path) -> None:
    weights = random_lora(tiny_parts(), size=0.1)
    path = tmp_path / "half.safetensors"
    write_lora(path, weights, {}, torch.float16)
    plain, by_hand, loaded = tiny_parts(), tiny_parts(), tiny_parts()
    merge(by_hand, weights)
    pipeline(loaded).load_lora_weights(str(path))
    for ours, theirs, base in zip(outputs(by_hand), outputs(loaded), outputs(plain), strict=True):
        assert (theirs - ours).norm() < 2e-3 * (ours - base).norm()


@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "two ranks and alphas"])
def test_diffusers_file_loads_in_diffusers_with_same_output(tmp_path: Path, mixed: bool) -> None:
    weights = random_lora(tiny_parts(), rank=3, alpha=5.0)
    if mixed:
        other = random_lora(tiny_parts(), rank=2, alpha=7.0, seed=2)
        weights = {name: other[name] if name.endswith(("to_v", "fc1")) else lora for name, lora in weights.items()}
    tensors, header = to_diffusers(weights, torch.float32)
    path = tmp_path / "dotted.safetensors"
    save_file(tensors, path, header)
    assert_same_effect(path, weights)


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_written_file_is_read_back_as_it_was(tmp_path: Path, spelling: str) -> None:
    parts = tiny_parts()
    weights = random_lora(parts, rank=3, alpha=5.0)
    path = tmp_path / "ink.safetensors"
    if spelling == "kohya":
        write_lora(path, weights, {}, torch.float32)
    else:
        tensors, header = to_diffusers(weights, torch.float32)
        save_file(tensors, path, header)
    file = read_lora_file(path, layer_shapes({"unet": parts.unet, "text_encoder": parts.text_encoder}))
    assert file.format == spelling
    assert_equal_weights(file.weights, weights)


def assert_equal_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, lora in expected.items():
        assert found[name].alpha == pytest.approx(lora.alpha, rel=1e-6), name
        assert torch.equal(found[name].lora_A, lora.lora_A), name
        assert torch.equal(found[name].lora_B, lora.lora_B), name


def test_file_saved_by_diffusers_is_read_with_its_alpha(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    parts = tiny_parts()
    torch.manual_seed(3)
    parts.unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False))
    parts.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=False))
    pipeline(parts).save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(parts.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(parts.text_encoder)),
        unet_lora_adapter_metadata=parts.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=parts.text_encoder.peft_config["default"].to_dict(),
    )
    clean = tiny_parts()
    file = read_lora_file(tmp_path, layer_shapes({"unet": clean.unet, "text_encoder": clean.text_encoder}))
    assert file.format == "diffusers"
    assert {lora.alpha for name, lora in file.weights.items() if name.startswith("unet.")} == {5.0}
    assert {lora.alpha for name, lora in file.weights.items() if name.startswith("text_encoder.")} == {7.0}
    merge(clean, dict(file.weights))
    for ours, theirs in zip(outputs(clean), outputs(parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha / rank", "alpha / sqrt(rank)"])
def test_peft_folder_is_read_with_the_output_it_had_in_peft(tmp_path: Path, rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    parts, clean = tiny_parts(), tiny_parts()
    torch.manual_seed(3)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "to_v", "proj_in"],
        alpha_pattern={"attn1.to_v": 9},
        rank_pattern={"attn1.to_v": 2},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = get_peft_model(parts.unet, config)
    model.save_pretrained(tmp_path / "unet")
    file = read_lora_file(tmp_path, layer_shapes({"unet": clean.unet, "text_encoder": clean.text_encoder}))
    assert file.format == "peft"
    merge(clean, dict(file.weights))
    torch.testing.assert_close(outputs(clean)[1], outputs(parts)[1], rtol=1e-5, atol=1e-5)
    assert (outputs(tiny_parts())[1] - outputs(clean)[1]).abs().max() > 0.01


def test_reader_takes_shapes_from_a_model_that_has_an_adapter_attached(tmp_path: Path) -> None:
    from peft import LoraConfig

    clean, adapted = tiny_parts(), tiny_parts()
    adapted.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_in"]))
    assert layer_shapes({"unet": adapted.unet}) == layer_shapes({"unet": clean.unet})


def test_file_obeys_the_rules_of_every_reader(tmp_path: Path) -> None:
    weights = random_lora(tiny_parts(), rank=3, alpha=5.0)
    path = tmp_path / "ink.safetensors"
    write_lora(path, weights, file_metadata(FACTS), torch.float16)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    # diffusers and InvokeAI: one known prefix for each key, nothing beside it; Forge drops files with strangers.
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in tensors)
    assert all("." not in key.removesuffix(".weight").rsplit(".", 1)[0] for key in tensors)
    assert not [key for key in tensors if "text_projection" in key or "lora_mid" in key]
    names = {key.split(".")[0] for key in tensors}
    assert len(tensors) == 3 * len(names) == 3 * len(weights)
    # A missing alpha means scale 1 to some readers and alpha = rank to others: it is always there, as a 0-d tensor.
    assert {tuple(tensors[f"{name}.alpha"].shape) for name in names} == {()}
    assert {float(tensors[f"{name}.alpha"]) for name in names} == {5.0}
    # CLIP's layers carry text_model, whatever the installed transformers calls them.
    encoder = {name for name in names if name.startswith("lora_te_")}
    assert all(name.startswith("lora_te_text_model_encoder_layers_") for name in encoder)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in encoder
    # What the original UNet stores as a 1x1 convolution stays four-dimensional.
    assert tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (3, 8, 1, 1)
    assert tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"].shape == (8, 3, 1, 1)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in tensors
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_down.weight" in tensors
    # The WebUI: the text "False", an SD 1 base, a hash of 64 digits.
    assert header["ss_v2"] == "False"
    assert header["ss_base_model_version"] == "sd_v1"
    assert len(header["sshs_model_hash"]) == 64
    assert json.loads(header["ss_bucket_info"]) == {"buckets": {}}
