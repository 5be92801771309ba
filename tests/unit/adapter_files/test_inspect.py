"""What `lora-scripts inspect` says of good, odd and broken files."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.picture_loras import facts, lora_weights, rewritten, write_ours
from lora_scripts.adapter_files.inspection import inspect_adapter
from lora_scripts.adapter_files.measure import block_norms, change_norm
from lora_scripts.adapter_files.reference import kohya_names
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.cli import main
from lora_scripts.export.metadata import file_metadata
from lora_scripts.export.writer import write_lora

REPOSITORY = Path(__file__).parents[3]
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ours(tmp_path_factory.mktemp("sd15") / "ink.safetensors", "sd15")


def test_a_finished_file_is_described_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = facts(
        "sdxl",
        base_model="sd_xl_base_1.0.safetensors",
        base_model_hash="31e35c80fc",
        trigger_word="mika ink",
        steps=1200,
        epochs=10,
        num_images=24,
        tag_frequency={"10_ink": {"ink wash": 24, "a cat": 3}},
    )
    path = tmp_path / "ink.safetensors"
    write_lora(path, lora_weights("sdxl"), file_metadata(trained), torch.float16, kohya_names("sdxl"))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for part in (
        "LoRA for SDXL",
        "U-Net 560",
        "text encoder 2 128",
        "alpha          3 (scale 1.5)",
        "fp16",
        "sd_xl_base_1.0.safetensors (sdxl_base_v1-0, hash 31e35c80fc)",
        "mika ink",
        "ink wash, a cat",
        "1,200 steps, 10 epochs, 24 pictures",
        "U-Net up 1",
        "Strongest layers",
        "AUTOMATIC1111  yes",
        "diffusers      yes",
    ):
        assert part in text, part


def test_json_holds_the_same_facts(sd15: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(sd15), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["kinds"], found["ranks"]) == ("sd15", {"lora": 176}, [2])
    assert [reader["ok"] for reader in found["readers"]] == [True] * 5
    layer = found["layers"][0]
    lora = lora_weights("sd15")[layer["name"]]
    assert layer["norm"] == pytest.approx(float(lora.delta().norm()), rel=1e-3)


@pytest.mark.parametrize("shape", [(24, 16), (24, 16, 3, 3)], ids=["linear", "convolution"])
def test_norm_of_a_pair_is_that_of_its_product(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    lora = LoRATensors(torch.randn(4, *shape[1:]), torch.randn(shape[0], 4, *[1] * (len(shape) - 2)), 7.0)
    assert change_norm(lora) == pytest.approx(float(lora.delta().double().norm()), rel=1e-6)


def test_block_norms_add_up_to_the_whole(sd15: Path) -> None:
    layers = inspect_adapter(sd15).layers
    blocks = block_norms(layers)
    assert {"U-Net mid", "text encoder"} <= set(blocks)
    whole = math.sqrt(sum((facts.norm or 0) ** 2 for facts in layers))
    assert math.sqrt(sum(norm**2 for norm, _ in blocks.values())) == pytest.approx(whole)


def changed(path: Path, to: Path, key: str, value: torch.Tensor | float) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[key] = torch.full_like(tensors[key], value) if isinstance(value, float) else value
        return tensors

    return rewritten(path, to, change)


@pytest.mark.fault(23)
def test_numbers_that_are_not_finite_are_named_and_end_with_2(
    sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(sd15, tmp_path / "nan.safetensors", f"{TO_Q}.lora_up.weight", float("nan"))
    assert main(["inspect", str(path)]) == 2
    out, err = capsys.readouterr()
    assert "LoRA for Stable Diffusion 1.x" in out
    assert f"{path}: 1 tensor holds numbers that are NaN or infinite: {TO_Q}.lora_up.weight (640)" in err


def test_layers_of_zeros_are_noted_and_a_file_of_zeros_is_a_fault(
    sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = changed(sd15, tmp_path / "one.safetensors", f"{TO_Q}.lora_up.weight", 0.0)
    assert main(["inspect", str(one)]) == 0
    assert "Note: 1 layer changes nothing" in capsys.readouterr().out
    pair = {f"{TO_Q}.lora_down.weight": torch.ones(2, 320), f"{TO_Q}.lora_up.weight": torch.zeros(320, 2)}
    save_file(pair, tmp_path / "all.safetensors")
    assert main(["inspect", str(tmp_path / "all.safetensors")]) == 2
    assert "the file does nothing" in capsys.readouterr().err


def test_oddities_are_noted(sd15: Path, tmp_path: Path) -> None:
    tensors = {key: value for key, value in load_file(sd15).items() if not key.endswith(f"{TO_Q}.alpha")}
    tensors[f"{TO_Q}.lora_up.weight"] = tensors[f"{TO_Q}.lora_up.weight"].to(torch.float8_e4m3fn)
    save_file({**tensors, "note": torch.ones(1)}, tmp_path / "odd.safetensors")
    notes = "\n".join(inspect_adapter(tmp_path / "odd.safetensors").notes)
    for part in ("1 key belongs to no layer: note", "1 layer has no alpha", "stored as F8_E4M3"):
        assert part in notes, part


def test_a_reader_that_does_not_take_the_file_is_shown_with_the_way_on(
    sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.safetensors"
    assert main(["convert", str(sd15), "--to", "diffusers", "--output", str(new)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(new)]) == 0
    text = capsys.readouterr().out
    assert "AUTOMATIC1111  no: it knows none of the 176 names" in text
    assert "lora-scripts convert FILE --to kohya" in text


def test_base_model_of_another_shape_or_without_the_layers_is_a_fault(
    sd15: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(sd15), "--base-model", str(tiny_sd_folder)]) == 2
    err = capsys.readouterr().err
    assert "layers are not in the base model" in err
    assert "layers have another shape in the base model" in err


@pytest.mark.fault(22)
@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"<!DOCTYPE html><html>login</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"", "empty"),
        (struct.pack("<Q", 50_000_000) + b"{" + b" " * 64, "header claims 50 MB"),
        (struct.pack("<Q", 90) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', "half a download"),
        (
            struct.pack("<Q", 107)
            + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
            + b"\0" * 4,
            "stands in it twice",
        ),
    ],
    ids=["web page", "git-lfs pointer", "pickle", "empty", "50 MB header", "half download", "duplicate keys"],
)
def test_what_is_no_whole_file_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, text: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for command in (
        ["inspect", str(path)],
        ["convert", str(path), "--to", "kohya", "--output", f"{path}.new.safetensors"],
    ):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert text in err
        assert str(path) in err


@pytest.mark.fault(23)
def test_a_tail_of_zeros_is_refused(sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = sd15.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:-200_000] + b"\0" * 200_000)
    assert main(["inspect", str(path)]) == 2
    assert "all zero" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("tools/*.py")), ids=lambda path: path.name)
def test_every_script_in_tools_starts_although_one_is_called_inspect(script: Path) -> None:
    if "argv" not in script.read_text("utf-8"):
        pytest.skip("makes data of the repository; takes no options")
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
