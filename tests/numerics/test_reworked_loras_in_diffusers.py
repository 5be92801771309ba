"""Resized and added-up LoRA files in diffusers: layers of different ranks must act as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.commands import command
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.export.kohya import read_lora_file
from lora_scripts.export.metadata import RunFacts, file_metadata
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.writer import write_lora
from numerics.test_export_diffusers import assert_same_effect
from unit.sampling.tiny_sd import random_lora, tiny_parts

Capsys = pytest.CaptureFixture[str]
FACTS = RunFacts("ink", "sd_v1", "stable-diffusion-v1/lora", rank=4, alpha=3.0)


def written(path: Path, rank: int, seed: int) -> Path:
    """A LoRA for every layer whose singular values fall faster in some layers than in others."""
    torch.manual_seed(seed)
    weights = {}
    for index, (layer, lora) in enumerate(random_lora(tiny_parts(), rank=rank, alpha=3.0).items()):
        falling = torch.arange(1, rank + 1).float().pow(-float(index % 4)).reshape(-1, *[1] * (lora.lora_A.ndim - 1))
        weights[layer] = LoRATensors(lora.lora_A * falling, lora.lora_B, lora.alpha)
    write_lora(path, weights, file_metadata(FACTS), torch.float32)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("resize", "one", "--keep", 0.9),
        ("resize", "one", "--keep", 0.6, "--max-rank", 3),
        ("merge", "--lora", "one", "--lora", "few", "--weight", 0.5),
    ],
    ids=["resized to a share", "resized to a small share", "added up, with layers that only one has"],
)
def test_file_of_several_ranks_acts_in_diffusers_as_its_layers_say(
    words: tuple[object, ...], tmp_path: Path, capsys: Capsys
) -> None:
    one = written(tmp_path / "one.safetensors", 4, 1)
    few = {
        name: lora
        for name, lora in read_lora_file(one, layer_shapes(tiny_parts().components)).weights.items()
        if "mid_block" not in name
    }
    write_lora(tmp_path / "few.safetensors", few, {}, torch.float32)
    output = tmp_path / "made.safetensors"
    files = [tmp_path / f"{word}.safetensors" if word in ("one", "few") else word for word in words]
    code, _, err = command(capsys, *files, "--output", output)
    assert (code, err) == (0, "")
    weights = read_lora_file(output, layer_shapes(tiny_parts().components)).weights
    assert len({lora.rank for lora in weights.values()}) > 1
    assert_same_effect(output, dict(weights))
