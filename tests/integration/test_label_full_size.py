"""A BLIP of the real size (base, 224 million weights, random) goes through the command as the small ones do."""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.tiny_captioners import write_full_size_blip
from lora_scripts.captioners.folders import BLIP_CAPTIONING, find_model
from lora_scripts.captioners.side_file import SideFile
from lora_scripts.cli import main


def test_a_full_size_blip_folder_labels_two_pictures_offline(tmp_path: Path, capsys) -> None:
    folder = write_full_size_blip(tmp_path / "blip")
    assert find_model(str(folder), BLIP_CAPTIONING).num_bytes > 440e6
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(pictures / f"{number}.jpg")
    assert (
        main(["label", "--input", str(pictures), "--model", str(folder), "--max-tokens", "6", "--device", "cpu"]) == 0
    )
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert f"(folder, {'bf16' if native else 'fp32'})" in capsys.readouterr().out
    with (pictures / "metadata.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert [row[0] for row in table] == ["filename", "0.jpg", "1.jpg"]
    records = SideFile.beside(pictures / "metadata.csv").records
    assert all(len(record.caption.split()) == 6 for record in records.values())
    assert all(0 < record.likelihood < 1 for record in records.values())
