"""Copying a weights file with changes: the sums, and the memory they take."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.allocator import allocated_peak
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import DataError
from lora_scripts.merging import stream
from lora_scripts.merging.stream import Change, PlannedTensor, add_changes, write_merged_file
from lora_scripts.models.layout_names import Place
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
    add_changes(weight, [Change.of(lora, 0.5), Change.of(lora, -1.0)])
    torch.testing.assert_close(weight, wanted)


def test_convolutions_are_changed_like_linear_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(6, 4, 3, 3)
    lora = LoRATensors(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 3.0)
    save_file({"conv.weight": kernel, "step": torch.tensor(7)}, tmp_path / "a.safetensors")
    header = inspect_weights(tmp_path / "a.safetensors")
    plan = [PlannedTensor("conv.weight", "conv.weight", {None: [Change.of(lora, 1.0)]}), PlannedTensor("step", "step")]
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
    plan = [PlannedTensor(name, name, {None: [Change.of(lora, 1.0)]}) for name in header.tensors]
    largest = 1024 * 512 * 4
    assert allocated_peak(lambda: write_merged_file(header, plan, tmp_path / "b.safetensors")) < 1.5 * largest


def test_disk_without_room_is_found_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(64, 64)}, tmp_path / "a.safetensors")
    header = inspect_weights(tmp_path / "a.safetensors")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"no room left on the disk, 0\.0 MB are needed"):
        write_merged_file(header, [PlannedTensor("a", "a")], tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_disk_that_fills_up_on_the_way_leaves_the_older_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(256, 256)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"older")
    header = inspect_weights(tmp_path / "a.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match="no room left on the disk"):
            write_merged_file(header, [PlannedTensor("a", "a")], tmp_path / "b.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "b.safetensors").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_third_of_a_tensor_and_a_turned_one_are_changed_in_place() -> None:
    torch.manual_seed(0)
    stored, lora = torch.randn(12, 5), LoRATensors(torch.randn(2, 5), torch.randn(4, 2), 3.0)
    wanted = stored.clone()
    wanted[4:8] += lora.delta()
    add_changes(Place("a", third=1).view_of(stored), [Change.of(lora, 1.0)])
    torch.testing.assert_close(stored, wanted)
    turned, lora = torch.randn(5, 4), LoRATensors(torch.randn(2, 5), torch.randn(4, 2), 3.0)
    wanted = turned + lora.delta().T
    add_changes(Place("a", turned=True).view_of(turned), [Change.of(lora, 1.0)])
    torch.testing.assert_close(turned, wanted)


def test_dora_and_lora_on_one_weight_are_both_added_to_the_weight_as_it_was() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    dora = LoRATensors(torch.randn(2, 5), torch.randn(6, 2), 3.0, torch.rand(6) + 0.5)
    lora = LoRATensors(torch.randn(2, 5), torch.randn(6, 2), 3.0)
    wanted = weight + 0.5 * dora.delta(weight) + lora.delta()
    for order in ([Change.of(dora, 0.5), Change.of(lora, 1.0)], [Change.of(lora, 1.0), Change.of(dora, 0.5)]):
        merged = weight.clone()
        add_changes(merged, order)
        torch.testing.assert_close(merged, wanted)
