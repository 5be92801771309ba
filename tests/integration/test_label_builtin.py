"""The built-in captioner through the label command, on scenes drawn afresh."""

import csv
from pathlib import Path

import numpy as np
import pytest

from lora_scripts.builtin.world import draw, random_scene, read_caption
from lora_scripts.captioners.side_file import SideFile
from lora_scripts.cli import main


@pytest.mark.parametrize("captioner", ["blip", "clip-blip"])
def test_the_built_in_captioner_names_what_is_in_its_world(
    tmp_path: Path, captioner: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("LORA_SCRIPTS_CAPTION_MODEL", raising=False)
    rng = np.random.default_rng(2024)
    scenes = [random_scene(rng) for _ in range(32)]
    for number, scene in enumerate(scenes):
        draw(scene, seed=700_000 + number).save(tmp_path / f"{number:02d}.png")
    assert main(["label", "--input", str(tmp_path), "--captioner", captioner, "--trigger", "mystyle"]) == 0
    out = capsys.readouterr().out
    assert "No full-size BLIP was found on this machine, so the small built-in model is used." in out
    with (tmp_path / "metadata.csv").open(encoding="utf-8", newline="") as file:
        captions = [row["prompt"] for row in csv.DictReader(file)]
    found = [read_caption(text) for text in captions]
    right = [read[kind] == getattr(scene, kind) for read, scene in zip(found, scenes, strict=True) for kind in read]
    assert np.mean(right) >= 0.85
    assert all(text.startswith("mystyle, ") for text in captions)
    records = SideFile.beside(tmp_path / "metadata.csv").records.values()
    assert {record.models["model"] for record in records} == {"builtin:mini-blip"}
