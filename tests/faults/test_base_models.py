"""What people have in hand when they think they have a base model or a LoRA, given to the command that trains."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import commands
from unit.models.test_weights_file import FAKES, torch_zip

Settings = Callable[..., dict[str, Any]]


class Trap:
    """A pickle of it writes a file when it is opened."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "it ran"))


@pytest.fixture
def model(tiny_sd_folder: Path, tmp_path: Path) -> Path:
    """A whole model that the test may damage."""
    return Path(shutil.copytree(tiny_sd_folder, tmp_path / "models" / "my-model"))


def refused(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path | str, **changes: Any
) -> str:
    """The message that a run on this model ends with: exit code 2, no step taken, no file written."""
    code, out, err = commands.train(settings(base_model=str(model), **changes), tmp_path, capsys)
    assert code == 2
    assert "Traceback" not in out + err
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    return err


@pytest.mark.fault(22)
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", FAKES)
def test_fake_is_named_for_what_it_is_whatever_its_name(
    kind: str, ending: str, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = FAKES[kind]
    path = tmp_path / f"v1-5-pruned{ending}"
    path.write_bytes(content)
    told = refused(settings, tmp_path, capsys, path)
    assert told.startswith(str(path))
    assert message in told
    assert len(told.splitlines()) == 1


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.pt", "model.bin"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickle_is_refused_by_content_and_never_run(
    name: str, protocol: int, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran"), protocol))
    told = refused(settings, tmp_path, capsys, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    assert "never loaded" in told


@pytest.mark.fault(22)
def test_pickles_in_a_model_folder_are_never_run(
    settings: Settings, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = model / "unet" / "diffusion_pytorch_model"
    unet.with_suffix(".bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    unet.with_suffix(".safetensors").unlink()
    told = refused(settings, tmp_path, capsys, model)
    assert "unet holds its weights as a pickle only (diffusion_pytorch_model.bin)" in told
    unet.with_suffix(".safetensors").write_bytes(torch_zip())
    assert "this is a pickle" in refused(settings, tmp_path, capsys, model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault(22)
def test_code_in_a_model_folder_is_never_run(
    settings: Settings, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for place in (model, model / "unet", model / "text_encoder", model / "tokenizer"):
        place.mkdir(exist_ok=True)
        for name in ("modeling.py", "pipeline.py", "__init__.py", "tokenization.py"):
            (place / name).write_text(trap)
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Trap"}
    (model / "text_encoder" / "config.json").write_text(json.dumps(config))
    code, _, err = commands.train(settings(base_model=str(model), max_steps=1), tmp_path, capsys)
    assert code == 0, err
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault(22)
def test_another_family_is_named(
    settings: Settings, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "flux1-dev.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.randn(4, 4)}, lone)
    assert "this is a Flux model; this version trains sd15" in refused(settings, tmp_path, capsys, lone)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    assert "this is a Stable Diffusion 3 model; this version trains sd15" in refused(settings, tmp_path, capsys, model)


@pytest.mark.fault(22)
def test_mistyped_folder_gets_the_nearest_name(
    settings: Settings, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(settings, tmp_path, capsys, model.with_name("my-modle"))
    assert f"no such file or folder. Did you mean {model}?" in told
    told = refused(settings, tmp_path, capsys, model.parent)
    assert "this folder is not itself a model. It holds my-model: give one of these." in told


@pytest.mark.fault(22)
def test_lora_to_go_on_from_that_is_a_pickle_is_refused(
    settings: Settings, tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old.pt", "old.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
        told = refused(settings, tmp_path, capsys, tiny_sd_folder, init_lora_weights=str(tmp_path / name))
        assert "never loaded" in told
    assert not (tmp_path / "ran").exists()


def zero_the_tail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-20_000] + bytes(20_000))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def repeat_a_key(path: Path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].decode().rstrip()
    key, entry = next((key, entry) for key, entry in json.loads(header).items() if key != "__metadata__")
    header = header.removesuffix("}") + f",{json.dumps(key)}:{json.dumps(entry)}}}"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + content[8 + length :])


def make_a_weight_nan(path: Path) -> None:
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[1] = torch.nan
    save_file(tensors, path)


def claim_a_header_of_50_mb(path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 50_000_000) + b"{")
        file.truncate(50_000_100)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "zeroed tail": (zero_the_tail, "bytes are all zero, from "),
    "cut": (cut, "half a download: 1,000 of "),
    "a key twice": (repeat_a_key, "stands in it twice"),
    "NaN": (make_a_weight_nan, "that are NaN or infinite: the weights are broken"),
    "header of 50 MB": (claim_a_header_of_50_mb, "its header claims 50 MB"),
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_with_file_and_reason(
    damage: str, part: str, settings: Settings, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / f"{part}.safetensors"
    spoil, message = DAMAGES[damage]
    spoil(path)
    told = refused(settings, tmp_path, capsys, model)
    assert told.startswith(str(path))
    assert message in told
    assert len(told.splitlines()) == 1


@pytest.mark.fault(23)
def test_damaged_lora_to_go_on_from_is_refused(
    settings: Settings, tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = commands.train(settings(max_steps=1), tmp_path, capsys)
    assert code == 0, err
    older = tmp_path / "older.safetensors"
    os.replace(tmp_path / "run" / "run.safetensors", older)
    shutil.rmtree(tmp_path / "run")
    make_a_weight_nan(older)
    told = refused(settings, tmp_path, capsys, tiny_sd_folder, init_lora_weights=str(older))
    assert told.startswith(f"init_lora_weights: {older}")
    assert "NaN" in told
