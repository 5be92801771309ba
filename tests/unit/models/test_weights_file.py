"""Weights files that are whole are read exactly; everything else is named for what it is."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_scripts.errors import ModelError
from lora_scripts.models.file_kinds import FILE_KINDS, looks_like
from lora_scripts.models.weights_file import MAX_HEADER_BYTES, check_finite, inspect_weights, read_tensors


def write_raw(path: Path, header: bytes | dict, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(128, 64).half(), "c": torch.arange(5)}
    save_file(tensors, path, {"who": "test"})
    return path


def test_header_of_a_whole_file_is_read_as_written(whole: Path) -> None:
    header = inspect_weights(whole)
    assert header.metadata == {"who": "test"}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a.weight": ("F32", (64, 64)),
        "b.weight": ("F16", (128, 64)),
        "c": ("I64", (5,)),
    }


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_tensors_are_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {
        "x": (torch.randn(7, 3) * 3).to(dtype),
        "scalar": torch.tensor(2).to(dtype),
        "none": torch.zeros(0, dtype=dtype),
    }
    save_file(values, tmp_path / "file.safetensors")
    header = inspect_weights(tmp_path / "file.safetensors")
    read = dict(read_tensors(header, header.tensors))
    assert read.keys() == values.keys()
    assert all(read[name].dtype == dtype and torch.equal(read[name], values[name]) for name in values)


def test_reading_converts_floats_only_and_reshapes(whole: Path) -> None:
    header = inspect_weights(whole)
    read = dict(read_tensors(header, header.tensors, dtype=torch.bfloat16, shapes={"a.weight": (64, 64, 1, 1)}))
    assert read["a.weight"].shape == (64, 64, 1, 1)
    assert read["b.weight"].dtype == torch.bfloat16
    assert read["c"].dtype == torch.int64


def test_every_float16_becomes_the_bfloat16_that_torch_makes_of_it(tmp_path: Path) -> None:
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).repeat(5)[:-1]
    save_file({"all": halves}, tmp_path / "file.safetensors")
    header = inspect_weights(tmp_path / "file.safetensors")
    [(_, read)] = read_tensors(header, ["all"], dtype=torch.bfloat16, finite=False)
    assert torch.equal(read.nan_to_num(7.0), halves.to(torch.bfloat16).nan_to_num(7.0))
    assert torch.equal(read.isnan(), halves.isnan())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_reading_keeps_every_tensor_apart_and_in_the_order_asked_for(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype | None
) -> None:
    values = {f"{n}": torch.randn(n, 3, 1 if n == 2 else 3, 2).to(stored) for n in (4, 2, 8)}
    values["flat"] = torch.randn(9, 4).to(stored)
    save_file(values, tmp_path / "file.safetensors")
    header = inspect_weights(tmp_path / "file.safetensors")
    read = dict(read_tensors(header, values, dtype=dtype, images=torch.channels_last))
    assert all(torch.equal(read[name], values[name].to(dtype or stored)) for name in values)
    assert all(read[name].is_contiguous(memory_format=torch.channels_last) for name in ("4", "2", "8"))
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == len(values)


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.safetensors", "x")
    return buffer.getvalue()


FAKES = {
    "empty": (b"", "the file is empty"),
    "zeros": (bytes(5000), "begins with zeros"),
    "html": (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4\n", "git lfs pull"),
    "pickle": (pickle.dumps({"state_dict": [1, 2]}), "never loaded"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(range(64)), "GGUF file, quantised"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(range(64)), "this is a picture"),
    "archive": (plain_zip(), "packed archive"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(range(64)), "HDF5"),
    "pdf": (b"%PDF-1.7 something", "PDF document"),
    "json": (b'{"_class_name": "UNet2DConditionModel"}', "JSON text"),
    "text": ("一个普通的文本文件, no weights in it".encode(), "text file"),
    "unknown": (bytes(range(1, 200)) * 3, "not a safetensors file"),
}


@pytest.mark.fault(22)
@pytest.mark.parametrize("kind", FAKES)
def test_a_fake_is_named_for_what_it_is_whatever_its_name(tmp_path: Path, kind: str) -> None:
    content, message = FAKES[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert looks_like(path) == kind
    with pytest.raises(ModelError, match=message):
        inspect_weights(path)


@pytest.mark.fault(22)
def test_every_kind_of_fake_has_a_test() -> None:
    assert set(FAKES) == set(FILE_KINDS)


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    "content",
    [
        torch_zip(),
        torch_zip()[:500],
        pickle.dumps([1], protocol=2),
        b"(dp0\nS'a'\np1\nI1\ns.",
        b"cnumpy.core\nload\n(tR.",
    ],
)
def test_pickles_are_told_by_content_also_when_cut(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"pickle \(.ckpt, .pt or .bin weights\).*converts?|never loaded"):
        inspect_weights(path)


@pytest.mark.fault(22)
def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.write_text, (tmp_path / "ran", "it ran"))

    for name, content in {"a.ckpt": pickle.dumps(Trap()), "b.safetensors": pickle.dumps(Trap(), protocol=2)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match="never loaded"):
            inspect_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "ran").exists(), "the trap itself works"


def test_safetensors_under_another_name_is_read(whole: Path, tmp_path: Path) -> None:
    renamed = whole.rename(tmp_path / "model.ckpt")
    assert "a.weight" in inspect_weights(renamed).tensors


@pytest.mark.fault(22)
@pytest.mark.fault(23)
def test_a_half_download_says_how_much_is_missing(whole: Path) -> None:
    size = whole.stat().st_size
    os.truncate(whole, size - 1000)
    with pytest.raises(ModelError, match=r"half a download: 1,000 of 32,808 bytes of weights are missing"):
        inspect_weights(whole)


@pytest.mark.fault(22)
@pytest.mark.fault(23)
def test_a_file_cut_inside_its_header_is_a_half_download(whole: Path) -> None:
    os.truncate(whole, 60)
    with pytest.raises(ModelError, match=r"half a download: the header alone needs"):
        inspect_weights(whole)


@pytest.mark.fault(23)
def test_bytes_after_the_last_tensor_are_refused(whole: Path) -> None:
    whole.write_bytes(whole.read_bytes() + b"more")
    with pytest.raises(ModelError, match="4 bytes follow after the last tensor"):
        inspect_weights(whole)


@pytest.mark.fault(23)
def test_a_zeroed_tail_is_refused(whole: Path) -> None:
    content = whole.read_bytes()
    whole.write_bytes(content[:-10_000] + bytes(10_000))
    with pytest.raises(ModelError, match=r"the last 10,0\d\d bytes are all zero, from 'b.weight' on.*broken off"):
        inspect_weights(whole)
    assert inspect_weights(whole, allow_zero_tail=True)


@pytest.mark.fault(23)
def test_a_tail_of_several_zero_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(64, 64), "b": torch.zeros(64, 64), "c": torch.zeros(64)}, path)
    with pytest.raises(ModelError, match="from 'b' on"):
        inspect_weights(path)


@pytest.mark.fault(23)
def test_an_untrained_lora_with_zero_lora_up_is_accepted(tmp_path: Path) -> None:
    tensors = {f"lora_unet_{index}.{part}.weight": value for index in range(3) for part, value in
               (("lora_down", torch.randn(8, 512)), ("lora_up", torch.zeros(512, 8)))}  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    assert len(inspect_weights(tmp_path / "lora.safetensors").tensors) == 6


@pytest.mark.fault(23)
def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    one = json.dumps(entry("F32", [1], 0, 4))
    path = write_raw(tmp_path / "x.safetensors", f'{{"a": {one}, "a": {one}}}'.encode(), b"abcd")
    with pytest.raises(ModelError, match="'a' stands in it twice"):
        inspect_weights(path)


@pytest.mark.fault(23)
def test_a_header_of_50_mb_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 50_000_000) + b"{")
        file.truncate(50_000_100)
    with pytest.raises(ModelError, match="its header claims 50 MB"):
        inspect_weights(path)
    assert MAX_HEADER_BYTES < 50_000_000


BROKEN_HEADERS = {
    "a gap": ({"a": entry("F32", [1], 4, 8)}, 8, "leaves a gap before it"),
    "an overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, 8, "overlaps the one before it"),
    "a wrong size": ({"a": entry("F32", [3], 0, 8)}, 8, r"has 8 bytes, but F32 \[3\] needs 12"),
    "a huge shape": ({"a": entry("F32", [1 << 62, 1 << 62], 0, 8)}, 8, "has 8 bytes, but F32"),
    "an unknown dtype": ({"a": entry("F12", [2], 0, 8)}, 8, "unknown dtype 'F12'"),
    "a list as dtype": ({"a": {**entry("F32", [2], 0, 8), "dtype": ["F32"]}}, 8, "unknown dtype"),
    "a negative number": ({"a": entry("F32", [-2], 0, -8)}, 8, "not a whole number"),
    "a fraction": ({"a": entry("F32", [2.0], 0, 8)}, 8, "not a whole number"),
    "a missing entry": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "lacks dtype, shape or data_offsets"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "b": entry("F32", [2], 0, 8)}, 8, "may hold only texts"),
    "no tensors": ({"__metadata__": {}}, 0, "lists no tensors"),
    "broken JSON": (b'{"a": ', 0, "not valid JSON"),
    "bad UTF-8": (b'{"a\xff": 1}', 0, "not valid JSON"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, 0, "not valid JSON"),
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", BROKEN_HEADERS)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, name: str) -> None:
    header, data_bytes, message = BROKEN_HEADERS[name]
    path = write_raw(tmp_path / "x.safetensors", header, b"\x01" * data_bytes)
    with pytest.raises(ModelError, match=message):
        inspect_weights(path)


@pytest.mark.fault(23)
def test_nan_weights_are_refused_by_name(tmp_path: Path) -> None:
    broken = torch.randn(10, 10)
    broken[3, 4] = torch.nan
    save_file({"fine": torch.randn(4), "blocks.7.weight": broken}, tmp_path / "x.safetensors")
    header = inspect_weights(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"blocks\.7\.weight holds 1 values of 100 that are NaN or infinite"):
        list(read_tensors(header, header.tensors, dtype=torch.float32))


def test_values_too_large_for_fp16_are_told_from_broken_ones(tmp_path: Path) -> None:
    save_file({"big": torch.tensor([1.0, 1e6])}, tmp_path / "x.safetensors")
    header = inspect_weights(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"big holds values that do not fit into float16\. Use bf16 or fp32"):
        list(read_tensors(header, header.tensors, dtype=torch.float16))
    assert dict(read_tensors(header, header.tensors, dtype=torch.bfloat16))["big"][1] > 9e5


@pytest.mark.fault(23)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("position", [0, 17, 999])
def test_one_bad_value_anywhere_is_found_in_every_dtype(dtype: torch.dtype, position: int) -> None:
    tensor = torch.randn(1000)
    check_finite(tensor.to(dtype), "x", "file")
    tensor[position] = torch.nan
    with pytest.raises(ModelError, match="x holds 1 values"):
        check_finite(tensor.to(dtype), "x", "file")


def test_a_missing_file_and_a_folder_are_told_plainly(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        inspect_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        inspect_weights(tmp_path)


@pytest.mark.fault(22)
@pytest.mark.fault(23)
def test_a_file_that_shrinks_while_it_is_read_is_an_error(whole: Path) -> None:
    header = inspect_weights(whole)
    os.truncate(whole, whole.stat().st_size - 100)
    with pytest.raises(ModelError, match="became shorter"):
        list(read_tensors(header, header.tensors))
