"""The models that ship: in the standard layouts, whole, and the same as a single file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import StableDiffusionPipeline
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, CLIPModel

from lora_scripts.builtin.weights import BUILTIN_NAMES, builtin_path
from lora_scripts.models.source import resolve_base_model
from lora_scripts.models.stable_diffusion import load_stable_diffusion

if TYPE_CHECKING:
    import pytest


def test_all_together_are_at_most_60_mb() -> None:
    total = sum(
        path.stat().st_size for name in BUILTIN_NAMES for path in builtin_path(name).rglob("*") if path.is_file()
    )
    assert total < 60e6


def test_mini_sd_loads_in_diffusers_with_the_same_weights() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(builtin_path("mini-sd"), safety_checker=None)
    parts = load_stable_diffusion(resolve_base_model("builtin:mini-sd"), "cpu", torch.float32)
    ids = pipeline.tokenizer("a red cat on the beach at night").input_ids
    assert ids == parts.tokenizer("a red cat on the beach at night").input_ids
    for name in ("unet", "vae", "text_encoder"):
        theirs, ours = getattr(pipeline, name).state_dict(), getattr(parts, name).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key].float(), ours[key].float()) for key in ours)


def test_mini_sd_as_an_original_layout_single_file_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    parts = load_stable_diffusion(resolve_base_model("builtin:mini-sd"), "cpu", torch.float32)
    source = resolve_base_model("builtin:mini-sd.safetensors")
    assert source.kind == "single_file"
    assert tmp_path in source.path.parents
    assert resolve_base_model("builtin:mini-sd.safetensors").path == source.path  # the second time it is there already
    single = load_stable_diffusion(source, "cpu", torch.float32)
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(parts, name).state_dict(), getattr(single, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_captioners_and_clip_load_in_transformers() -> None:
    for kind, name in (
        (BlipForConditionalGeneration, "mini-blip"),
        (BlipForImageTextRetrieval, "mini-blip-itm"),
        (CLIPModel, "mini-clip"),
    ):
        model, info = kind.from_pretrained(builtin_path(name), output_loading_info=True)
        assert not info["missing_keys"], name
        assert not info["unexpected_keys"], name
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
