"""The demo's own parts; the whole of it runs in `.ci/run`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_scripts.builtin.world import STYLES
from lora_scripts.cli import main
from lora_scripts.config_file import load_config
from lora_scripts.demo import Reading, demo_config, draw_pictures, side_by_side


def test_unknown_style_is_refused_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "demo"), "--style", "inkwash"]) == 2
    assert "Did you mean ink wash?" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "was not made by the demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_its_settings_file_trains_as_it_stands(tmp_path: Path) -> None:
    config = demo_config(tmp_path, "ink wash", 42)
    written, _ = load_config(tmp_path / "demo.yaml")
    assert written == config


def test_pictures_are_of_the_style_and_repeatable(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "a", STYLES[0], 1)
    draw_pictures(tmp_path / "b", STYLES[0], 1)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 24
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_kept_share_is_after_over_before() -> None:
    assert Reading(0.0, 0.9, 0.8, 0.6).attributes_kept == pytest.approx(0.75)


def test_side_by_side_shows_every_picture() -> None:
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    sheet = np.asarray(side_by_side(images, images[::-1], ["one", "two", "three"]))
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert (sheet == colour).all(axis=2).sum() == 2 * 256 * 256
