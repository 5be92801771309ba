"""Encodings on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache, cache_folder, cache_key

TENSORS = {"latents_mean": torch.arange(12.0).reshape(3, 4), "prompt_embeds": torch.ones(2, dtype=torch.bfloat16)}


def stored(folder: Path) -> tuple[EncodingCache, Path]:
    cache = EncodingCache(folder)
    cache.put("latents", "ab12", TENSORS)
    return cache, next(folder.rglob("*.safetensors"))


def test_what_is_put_comes_back(tmp_path: Path) -> None:
    cache, _ = stored(tmp_path)
    back = cache.get("latents", "ab12")
    assert back is not None
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_absent_entry_is_none(tmp_path: Path) -> None:
    assert EncodingCache(tmp_path).get("latents", "ff") is None
    assert EncodingCache(None).get("latents", "ff") is None


def test_cache_lies_in_the_data_folder_and_beside_a_single_file(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.touch()
    for data in (tmp_path, file):
        config = RunConfig(train_data_dir=data, base_model="builtin:mini-sd", output_dir=tmp_path / "out")
        assert cache_folder(config) == tmp_path / ".cache"


@pytest.mark.fault(17)
@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "zeroed tail"])
def test_damaged_entry_counts_as_absent(tmp_path: Path, damage: str) -> None:
    cache, path = stored(tmp_path)
    raw = bytearray(path.read_bytes())
    if damage == "half":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        raw[-40] ^= 1
    elif damage == "empty":
        raw = bytearray()
    else:
        raw[-20:] = bytes(20)
    path.write_bytes(raw)
    assert cache.get("latents", "ab12") is None
    cache.put("latents", "ab12", TENSORS)
    assert cache.get("latents", "ab12") is not None


@pytest.mark.fault(16)
def test_key_covers_all_that_shapes_the_value() -> None:
    base = cache_key("vae-1", picture="aa", fit=[1, 2], mirrored=False)
    assert base == cache_key("vae-1", mirrored=False, fit=[1, 2], picture="aa")
    others = [
        cache_key("vae-2", picture="aa", fit=[1, 2], mirrored=False),
        cache_key("vae-1", picture="ab", fit=[1, 2], mirrored=False),
        cache_key("vae-1", picture="aa", fit=[1, 3], mirrored=False),
        cache_key("vae-1", picture="aa", fit=[1, 2], mirrored=True),
    ]
    assert len({base, *others}) == 5


def test_full_disk_costs_the_entry_not_the_run(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    EncodingCache(blocked).put("latents", "ab12", TENSORS)
    assert blocked.read_text() == "in the way"
