"""Fingerprints change with the weights, and only with them; other programs' hashes come out as theirs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_scripts.models.hashes import file_sha256, webui_legacy_hash, weights_fingerprint
from lora_scripts.models.weights_file import inspect_weights


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"blocks.{index}.weight": torch.randn(400, 400, generator=generator) for index in range(20)}


def fingerprint(path: Path) -> str:
    return weights_fingerprint([inspect_weights(path)])


def test_a_copy_has_the_same_fingerprint(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    os.utime(tmp_path / "b.safetensors", (1, 1))
    assert fingerprint(tmp_path / "a.safetensors") == fingerprint(tmp_path / "b.safetensors")


@pytest.mark.parametrize("index", [0, 7, 19])
def test_training_a_single_layer_changes_the_fingerprint(
    tmp_path: Path, tensors: dict[str, torch.Tensor], index: int
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    tensors[f"blocks.{index}.weight"] *= 1.001
    save_file(tensors, tmp_path / "b.safetensors")
    assert fingerprint(tmp_path / "a.safetensors") != fingerprint(tmp_path / "b.safetensors")


def test_names_metadata_and_configurations_change_the_fingerprint(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", {"modelspec.prediction_type": "v"})
    save_file({f"x{name}": tensor for name, tensor in tensors.items()}, tmp_path / "c.safetensors")
    header = inspect_weights(tmp_path / "a.safetensors")
    prints = {fingerprint(tmp_path / f"{name}.safetensors") for name in "abc"}
    prints |= {weights_fingerprint([header], [b"{}"]), weights_fingerprint([header], [b"{ }"])}
    assert len(prints) == 5


def test_files_without_room_for_windows_have_fingerprints(tmp_path: Path) -> None:
    prints = set()
    for value in (1.0, 2.0):
        save_file({"x": torch.tensor([value]), "none": torch.zeros(0)}, tmp_path / "x.safetensors")
        prints.add(fingerprint(tmp_path / "x.safetensors"))
    assert len(prints) == 2


def test_sha256_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    cache, path = tmp_path / "cache" / "hashes.json", tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    assert file_sha256(path, cache_file=cache) == hashlib.sha256(b"one").hexdigest()
    known = json.loads(cache.read_text())
    known[str(path.resolve())]["sha256"] = "remembered"
    cache.write_text(json.dumps(known))
    assert file_sha256(path, cache_file=cache) == "remembered"
    path.write_bytes(b"three")
    assert file_sha256(path, cache_file=cache) == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("content", ["", "[]", "{broken", '{"x": 1}'])
def test_a_damaged_memory_of_hashes_costs_nothing_but_time(tmp_path: Path, content: str) -> None:
    (tmp_path / "hashes.json").write_text(content)
    (tmp_path / "x").write_bytes(b"one")
    assert file_sha256(tmp_path / "x", cache_file=tmp_path / "hashes.json") == hashlib.sha256(b"one").hexdigest()


def test_a_place_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    blocked = tmp_path / "file" / "hashes.json"
    assert file_sha256(tmp_path / "file", cache_file=blocked) == hashlib.sha256(b"one").hexdigest()


def test_the_webui_legacy_hash_reads_64_kb_after_the_first_megabyte(tmp_path: Path) -> None:
    content = os.urandom(0x120000)
    (tmp_path / "x").write_bytes(content)
    assert webui_legacy_hash(tmp_path / "x") == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
