"""Six pictures and a small random BLIP that captions them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.labelling import draw
from helpers.tiny_captioners import write_blip, write_clip
from lora_scripts.captioners.label import LabelOptions
from lora_scripts.captioners.protocol import CaptionerSettings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_blip(root / "blip")
    write_blip(root / "other", seed=5)
    write_clip(root / "clip")
    return root


@pytest.fixture
def options(tmp_path: Path, models: Path) -> LabelOptions:
    folder = tmp_path / "pictures"
    for number in range(6):
        draw(folder / f"img{number}.png", number)
    return LabelOptions(
        folder=folder,
        output=folder / "metadata.csv",
        model=str(models / "blip"),
        settings=CaptionerSettings(max_tokens=8),
        device="cpu",
        num_workers=2,
        batch_size=2,
    )
