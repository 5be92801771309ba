"""`lora-scripts resize`, run as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.commands import command
from helpers.lora_files import LAYERS, METADATA, changes_in, random_lora_tensors, save_lora

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return save_lora(tmp_path / "before.safetensors", random_lora_tensors(64, 20.0))


def resized(capsys: Capsys, lora: Path, *words: object) -> tuple[Path, str]:
    output = lora.parent / "after.safetensors"
    code, out, err = command(capsys, "resize", lora, "--output", output, *words)
    assert (code, err) == (0, "")
    return output, out


def refused(capsys: Capsys, lora: Path, output: Path, *words: object) -> str:
    code, _, err = command(capsys, "resize", lora, "--output", output, *words)
    assert code == 2
    assert "Traceback" not in err
    assert not list(output.parent.glob(".*.tmp"))
    return err.strip()


def test_rank_64_file_at_rank_16_keeps_what_the_eckart_young_bound_allows(lora: Path, capsys: Capsys) -> None:
    output, out = resized(capsys, lora, "--rank", 16)
    lost = size = 0.0
    after = changes_in(output)
    for name, before in changes_in(lora).items():
        values = torch.linalg.svdvals(before.float()).double()
        best = float(values[16:].norm())
        assert float((before - after[name]).norm()) == pytest.approx(best, rel=1e-4)
        lost, size = lost + best**2, size + float(before.square().sum())
    assert f"keeps {1 - lost / size:.2%} of the squared Frobenius norm" in out
    assert all(tensor.shape[0] == 16 for name, tensor in load_file(output).items() if "lora_down" in name)


def test_keep_gives_every_layer_the_smallest_rank_that_keeps_the_share(lora: Path, capsys: Capsys) -> None:
    output, out = resized(capsys, lora, "--keep", 0.9, "--report")
    after = load_file(output)
    for name, before in changes_in(lora).items():
        squares = torch.linalg.svdvals(before.float()).double().square()
        rank = after[f"{name}.lora_down.weight"].shape[0]
        assert squares[:rank].sum() >= 0.9 * squares.sum() > squares[: rank - 1].sum()
    assert len({float(tensor) for name, tensor in after.items() if name.endswith("alpha")}) == 1
    assert out.count("of its squared norm") == len(LAYERS)


def test_max_rank_and_conv_rank_limit_their_layers(lora: Path, capsys: Capsys) -> None:
    output, _ = resized(capsys, lora, "--keep", 0.99, "--max-rank", 5)
    assert {tensor.shape[0] for name, tensor in load_file(output).items() if "lora_down" in name} == {5}
    output, _ = resized(capsys, lora, "--rank", 8, "--conv-rank", 3, "--force")
    ranks = {name: tensor.shape[0] for name, tensor in load_file(output).items() if "lora_down" in name}
    assert {rank for name, rank in ranks.items() if "conv1" in name} == {3}
    assert {rank for name, rank in ranks.items() if "conv1" not in name} == {8}


def test_header_says_the_new_rank_and_keeps_the_rest(lora: Path, capsys: Capsys) -> None:
    output, _ = resized(capsys, lora, "--rank", 4)
    with safe_open(output, "pt") as file:
        texts = file.metadata()
    assert (texts["ss_network_dim"], texts["ss_network_alpha"], texts["ss_output_name"]) == ("4", "4", "after")
    kept = ("ss_base_model_version", "ss_tag_frequency", "modelspec.trigger_phrase")
    assert {key: texts[key] for key in kept} == {key: METADATA[key] for key in kept}
    assert texts["sshs_model_hash"] != METADATA["sshs_model_hash"]
    assert json.loads(texts["lora_scripts.history"])[0].startswith("resized from before.safetensors, rank 64 to 4")


def test_higher_rank_than_the_file_has_changes_nothing_of_what_it_does(lora: Path, capsys: Capsys) -> None:
    output, out = resized(capsys, lora, "--rank", 128)
    assert "nothing of the change is lost" in out
    for name, before in changes_in(lora).items():
        torch.testing.assert_close(changes_in(output)[name], before, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_file_keeps_its_number_format(tmp_path: Path, capsys: Capsys, dtype: torch.dtype) -> None:
    lora = save_lora(tmp_path / "before.safetensors", random_lora_tensors(8, 4.0), dtype=dtype)
    output, _ = resized(capsys, lora, "--rank", 4)
    assert {tensor.dtype for name, tensor in load_file(output).items() if "lora" in name.rpartition(".")[0]} == {dtype}


def test_wrong_requests_are_told_before_anything_is_read(lora: Path, tmp_path: Path, capsys: Capsys) -> None:
    output = tmp_path / "after.safetensors"
    assert "--rank" in refused(capsys, lora, output)
    assert "only one of them" in refused(capsys, lora, output, "--rank", 4, "--keep", 0.5)
    assert "--keep" in refused(capsys, lora, output, "--keep", 98)
    assert "must end in .safetensors" in refused(capsys, lora, tmp_path / "after.pt", "--rank", 4)
    assert "which is read" in refused(capsys, lora, lora, "--rank", 4, "--force")
    output.write_bytes(b"older")
    assert "--force" in refused(capsys, lora, output, "--rank", 4)
    assert output.read_bytes() == b"older"


def test_damaged_file_is_refused_and_the_older_output_stays(lora: Path, tmp_path: Path, capsys: Capsys) -> None:
    output = tmp_path / "after.safetensors"
    output.write_bytes(b"older")
    lora.write_bytes(lora.read_bytes()[:-5000])
    assert "half a download" in refused(capsys, lora, output, "--rank", 4, "--force")
    assert output.read_bytes() == b"older"


def test_loha_is_sent_to_bake(tmp_path: Path, capsys: Capsys) -> None:
    name = next(iter(LAYERS))
    parts = {"w1_a": (320, 4), "w1_b": (4, 320), "w2_a": (320, 4), "w2_b": (4, 320)}
    tensors = {f"{name}.hada_{part}": torch.randn(shape) for part, shape in parts.items()}
    lora = save_lora(tmp_path / "loha.safetensors", tensors | {f"{name}.alpha": torch.tensor(2.0)})
    assert "lora-scripts bake" in refused(capsys, lora, tmp_path / "after.safetensors", "--rank", 4)


def test_no_room_on_the_disk_is_said_and_leaves_no_file(
    lora: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "no room left on the disk" in refused(capsys, lora, tmp_path / "after.safetensors", "--rank", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before.safetensors"]
