"""A base model that is none, given to every command that takes one: one message that names it, and exit code 2."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from faults.test_base_models import Trap, cut, make_a_weight_nan
from helpers import commands
from helpers.tiny_diffusion import save_single_file, tiny_parts
from unit.models.test_recognise_full_size import refiner
from unit.sampling.tiny_sd import random_lora
from unit.sampling.tiny_sd import tiny_parts as tiny_sd

Settings = Callable[..., dict[str, Any]]
Capsys = pytest.CaptureFixture[str]
COMMANDS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "targets": lambda base, lora, out: ["targets", base],
    "inspect": lambda base, lora, out: ["inspect", lora, "--base-model", base],
    "merge": lambda base, lora, out: ["merge", "--base-model", base, "--lora", lora, "--output", out / "a.safetensors"],
    "extract": lambda base, lora, out: [
        "extract", "--tuned", base, "--base-model", base, "--rank", 1, "--output", out / "a.safetensors",
    ],
    "bake": lambda base, lora, out: ["bake", lora, "--base-model", base, "--output", out / "a.safetensors"],
    "convert": lambda base, lora, out: [
        "convert", lora, "--to", "diffusers", "--bake", "--base-model", base, "--output", out / "a.safetensors",
    ],
    "sample": lambda base, lora, out: [
        "sample", "--base-model", base, "--prompt", "a fox", "--steps", 1, "--device", "cpu", "--output", out / "a",
    ],
    "plan": lambda base, lora, out: ["plan", out / "my.yaml"],
    "check": lambda base, lora, out: ["check", "--config", out / "my.yaml"],
    "train": lambda base, lora, out: ["train", "--config", out / "my.yaml"],
}  # fmt: skip


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.with_name("ran"))))


def write_lora(path: Path) -> None:
    pair = {"lora_down.weight": torch.randn(2, 8), "lora_up.weight": torch.randn(8, 2)}
    save_file({f"lora_unet_mid_block_attentions_0_proj_in.{name}": tensor for name, tensor in pair.items()}, path)


def write_refiner(path: Path) -> None:
    save_single_file(tiny_parts("sdxl"), path)
    tensors = load_file(path)
    shapes = refiner({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (8, 4, 3, 3)
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, path)


def write_half_a_download(path: Path) -> None:
    save_single_file(tiny_parts("sdxl"), path)
    cut(path)


NO_BASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (write_pickle, "never loaded"),
    "LoRA": (write_lora, "this is a LoRA file, not a base model"),
    "refiner": (write_refiner, "this is an SDXL refiner"),
    "half a download": (write_half_a_download, "half a download: 1,000 of"),
}


@pytest.fixture
def dora(tmp_path: Path) -> Path:
    """A file that is baked only beside its base."""
    from lora_scripts.export.writer import write_lora as write

    path = tmp_path / "dora.safetensors"
    write(path, random_lora(tiny_sd()), {}, torch.float32)
    tensors = load_file(path)
    lengths = {
        key.replace("lora_up.weight", "dora_scale"): torch.ones(tensor.shape[0], *[1] * (tensor.ndim - 1))
        for key, tensor in tensors.items()
        if key.endswith("lora_up.weight")
    }
    save_file(tensors | lengths, path)
    return path


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", NO_BASES)
def test_what_is_no_base_model_ends_in_one_message(
    kind: str, name: str, dora: Path, settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    (tmp_path / "models").mkdir()
    base = tmp_path / "models" / "sd_xl_base_1.0.safetensors"
    write, message = NO_BASES[kind]
    write(base)
    out = tmp_path / "out"
    out.mkdir()
    (out / "my.yaml").write_text(yaml.safe_dump(settings(base_model=str(base))), "utf-8")
    code, _, err = commands.command(capsys, *COMMANDS[name](base, dora, out))
    assert code == 2
    assert message in err
    assert str(base) in err
    assert err.count("\n") == 1
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["my.yaml"]
    assert not (base.parent / "ran").exists()


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", ["merge", "sample", "train"])
def test_numbers_that_are_not_finite_end_in_one_message(
    name: str, dora: Path, settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    base = save_single_file(tiny_parts("sdxl"), tmp_path / "base.safetensors")
    with safe_open(base, "pt") as file:
        texts = file.metadata()  # which say what so small a model's shapes do not
    make_a_weight_nan(base)
    save_file(load_file(base), base, texts)
    out = tmp_path / "out"
    out.mkdir()
    (out / "my.yaml").write_text(yaml.safe_dump(settings(base_model=str(base))), "utf-8")
    lora = tmp_path / "xl.safetensors"
    save_file(
        {
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.randn(2, 8),
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.randn(8, 2),
        },
        lora,
    )
    code, _, err = commands.command(capsys, *COMMANDS[name](base, lora, out))
    assert code == 2
    assert "NaN or infinite: the weights are broken" in err
    assert str(base) in err
    assert err.count("\n") == 1
    assert not list(out.rglob("*.safetensors"))
