"""Batches: the size that is found by trying, and pictures read ahead in threads."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_scripts.captioners.batching import BatchSize, Loader, is_out_of_memory
from lora_scripts.errors import ModelError


def settle(size: BatchSize, seconds_of: dict[int, float]) -> list[int]:
    """The sizes that are tried when a batch of n takes the given time."""
    tried = []
    for _ in range(20):
        tried.append(size.value)
        size.record(size.value, seconds_of[size.value])
    return tried


def test_the_size_doubles_while_that_is_faster_and_then_stays() -> None:
    tried = settle(BatchSize(None, "mps"), {2: 1.5, 4: 2.0, 8: 5.0})
    assert tried[:4] == [2, 2, 4, 8]
    assert set(tried[4:]) == {4}


def test_the_size_stays_small_where_larger_batches_do_not_help() -> None:
    assert set(settle(BatchSize(None, "mps"), {2: 1.0, 4: 2.2})[3:]) == {2}


def test_the_size_ends_at_the_largest_of_the_device() -> None:
    assert settle(BatchSize(None, "mps"), dict.fromkeys((1, 2, 4, 8, 16), 1.0))[-1] == 16


def test_a_cpu_goes_on_with_the_batch_that_its_decoder_likes() -> None:
    tried = settle(BatchSize(None, "cpu"), {8: 1.0, 16: 1.0})
    assert tried[0] == 8
    assert set(tried[1:]) == {16}


def test_the_users_size_is_kept() -> None:
    assert set(settle(BatchSize(5, "cpu"), {5: 99.0})) == {5}


def test_lack_of_memory_halves_for_good_and_ends_at_one() -> None:
    size = BatchSize(None, "cuda")
    size.out_of_memory()
    assert size.value == 4
    size.record(4, 0.001)
    assert size.value == 4
    size.out_of_memory()
    size.out_of_memory()
    with pytest.raises(ModelError, match="Not enough memory to caption a single picture"):
        size.out_of_memory()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_faults(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_pictures_come_in_order_and_copies_are_decoded_once(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        Image.new("RGB", (16, 16), (number // 2, 0, 0)).save(tmp_path / name)
    decoded, lock = [], threading.Lock()

    def prepare(image: Image.Image) -> int:
        with lock:
            decoded.append(image.getpixel((0, 0))[0])
        return decoded[-1]

    with Loader(tmp_path, names, prepare, at_least=16, num_workers=4, ahead=lambda: 5) as loader:
        pictures = list(loader)
    assert [picture.name for picture in pictures] == names
    assert sorted(decoded) == list(range(6))
    assert sum(picture.prepared is None for picture in pictures) == 6


@pytest.mark.fault(7)
def test_row_7_a_damaged_picture_is_handed_on_with_its_fault(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[: len(data) // 2])
    with Loader(
        tmp_path, ["a.png", "b.png", "c.png"], lambda image: 1, at_least=16, num_workers=2, ahead=lambda: 2
    ) as loader:
        good, damaged, missing = loader
    assert good.prepared == 1
    assert damaged.fault.startswith("cannot be decoded (truncated file)")
    assert missing.fault.startswith("no such file")
