"""An autoencoder that overflows in half precision, as that of SDXL does on some pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers import commands
from lora_scripts.config import RunConfig
from lora_scripts.families import latent_diffusion, sd15
from lora_scripts.train_command import train_and_report

Settings = Callable[..., dict[str, Any]]
LARGE = 4e4


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder whose first layer is so large that bright pixels pass 65504; the norm behind it brings them back."""
    honest = latent_diffusion.load_stable_diffusion

    def load(*args: Any, **options: Any) -> Any:
        parts = honest(*args, **options)
        parts.read_rest()
        first = parts.vae.encoder.conv_in
        first.weight.data.fill_(LARGE / 27)
        first.bias.data.fill_(LARGE)
        return parts

    monkeypatch.setattr(latent_diffusion, "load_stable_diffusion", load)


@pytest.fixture
def dark(pictures: Path) -> Path:
    """Dark pictures, whose sums stay small, but for two bright ones."""
    for number in range(8):
        Image.new("RGB", (64, 64), (250, 255, 240 + number) if number in (2, 5) else (number, 0, 9)).save(
            pictures / f"0{number}.png"
        )
    return pictures


@pytest.mark.fault(10)
@pytest.mark.usefixtures("overflowing")
def test_overflowing_pictures_are_named_and_encoded_again_in_float32(
    settings: Settings, dark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = commands.train(settings(max_steps=2, resolution=64, vae_precision="fp16"), tmp_path, capsys)
    assert code == 0, err
    named = [line for line in out.splitlines() if "encoded again in float32" in line]
    assert len(named) == 2
    assert "02.png" in named[0]
    assert "05.png" in named[1]
    assert "8 of 8 pictures train." in out
    entries = [load_file_with_digest(path) for path in (dark / ".cache" / "latents").rglob("*.safetensors")]
    assert len(entries) == 8
    assert all(bool(tensor.isfinite().all()) for entry in entries for tensor in entry.values())


@pytest.mark.fault(10)
@pytest.mark.usefixtures("overflowing")
def test_picture_without_finite_encoding_in_float32_is_left_out_by_name(
    settings: Settings, dark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = sd15.StableDiffusion15._encode_pixels

    def broken(self: Any, pixels: Any) -> Any:
        return [
            {name: tensor * (torch.nan if image.mean() > 0.9 else 1) for name, tensor in entry.items()}
            for image, entry in zip(pixels, honest(self, pixels), strict=True)
        ]

    monkeypatch.setattr(sd15.StableDiffusion15, "_encode_pixels", broken)
    outcome = train_and_report(RunConfig.model_validate(settings(max_steps=2, resolution=64, vae_precision="fp16")))
    assert outcome.complete
    assert [item.name for item in outcome.dataset.left_out] == ["02.png", "05.png"]
    assert all("not finite, in float32 too" in item.reason for item in outcome.dataset.left_out)


@pytest.mark.fault(10)
def test_caption_without_finite_encoding_stops_the_run_with_its_text(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = sd15.StableDiffusion15.embed
    monkeypatch.setattr(sd15.StableDiffusion15, "embed", lambda self, texts: honest(self, texts) * torch.nan)
    code, _, err = commands.train(settings(trigger_word="sks"), tmp_path, capsys)
    assert code == 2
    assert "numbers that are not finite for the caption 'sks, " in err
    assert "mixed_precision: fp32" in err


def load_file_with_digest(path: Path) -> dict[str, torch.Tensor]:
    """An entry of the cache: a safetensors file with 32 bytes behind it."""
    from safetensors.torch import load

    return load(path.read_bytes()[:-32])
