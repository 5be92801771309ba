"""Copying a weights file with changes: the sums, and the memory they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.allocator import allocated_peak
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.merging import stream
from lora_scripts.merging.stream import Change, PlannedTensor, add_changes, write_merged_file
from lora_scripts.models.weights_file import inspect_weights


@pytest.mark.parametrize("rows_bytes", [1, 4 * 12 * 3, 32_000_000], ids=["row by row", "three rows", "all"])
def test_sums_do_not_depend_on_how_many_rows_are_done_at_a_time(
    rows_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_ROWS_BYTES", rows_bytes)
    torch.manual_seed(0)
    weight = torch.randn(7, 12)
    lora = LoRATensors(torch.randn(3, 12), torch.randn(7, 3), 5.0)
    wanted = weight + 0.5 * lora.delta() - lora.delta()
    add_changes(weight, [Change(lora, 0.5), Change(lora, -1.0)])
    torch.testing.assert_close(weight, wanted)


def test_convolutions_are_changed_like_linear_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(6, 4, 3, 3)
    lora = LoRATensors(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 3.0)
    save_file({"conv.weight": kernel, "step": torch.tensor(7)}, tmp_path / "a.safetensors")
    header = inspect_weights(tmp_path / "a.safetensors")
    plan = [PlannedTensor("conv.weight", "conv.weight", [Change(lora, 1.0)]), PlannedTensor("step", "step")]
    write_merged_file(header, plan, tmp_path / "b.safetensors")
    merged = load_file(tmp_path / "b.safetensors")
    torch.testing.assert_close(merged["conv.weight"], kernel + lora.delta())
    assert merged["step"] == 7
    inspect_weights(tmp_path / "b.safetensors")


def test_memory_is_one_tensor_and_a_few_rows_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_ROWS_BYTES", 200_000)
    save_file({f"layer.{index}": torch.ones(1024, 512) for index in range(6)}, tmp_path / "a.safetensors")
    lora = LoRATensors(torch.ones(4, 512), torch.ones(1024, 4), 4.0)
    header = inspect_weights(tmp_path / "a.safetensors")
    plan = [PlannedTensor(name, name, [Change(lora, 1.0)]) for name in header.tensors]
    largest = 1024 * 512 * 4
    assert allocated_peak(lambda: write_merged_file(header, plan, tmp_path / "b.safetensors")) < 1.5 * largest
