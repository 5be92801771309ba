"""Damaged and foreign LoRA files, given to every command that reads one: one message that names the file, and exit code 2."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults.test_base_models import DAMAGES, Trap
from helpers import commands
from unit.models.test_weights_file import FAKES, torch_zip
from unit.sampling.tiny_sd import random_lora, tiny_parts

Settings = Callable[..., dict[str, Any]]
Capsys = pytest.CaptureFixture[str]
Words = Callable[[Path, Path, Path], list[object]]
"""(LoRA file, base model, folder to write to) to a command."""

COMMANDS: dict[str, Words] = {
    "inspect": lambda lora, base, out: ["inspect", lora],
    "inspect beside a base": lambda lora, base, out: ["inspect", lora, "--base-model", base],
    "convert to kohya": lambda lora, base, out: ["convert", lora, "--to", "kohya", "--output", out / "a.safetensors"],
    "convert to diffusers": lambda lora, base, out: [
        "convert", lora, "--to", "diffusers", "--output", out / "a.safetensors",
    ],
    "convert to peft": lambda lora, base, out: ["convert", lora, "--to", "peft", "--output", out / "a"],
    "convert and bake": lambda lora, base, out: ["convert", lora, "--to", "peft", "--bake", "--output", out / "a"],
    "merge": lambda lora, base, out: ["merge", "--lora", lora, "--output", out / "a.safetensors"],
    "merge into a base": lambda lora, base, out: [
        "merge", "--base-model", base, "--lora", lora, "--output", out / "a",
    ],
    "resize": lambda lora, base, out: ["resize", lora, "--rank", 1, "--output", out / "a.safetensors"],
    "extract": lambda lora, base, out: [
        "extract", "--tuned", lora, "--base-model", base, "--rank", 1, "--output", out / "a.safetensors",
    ],
    "bake": lambda lora, base, out: ["bake", lora, "--output", out / "a.safetensors"],
    "bake beside a base": lambda lora, base, out: [
        "bake", lora, "--base-model", base, "--output", out / "a.safetensors",
    ],
    "sample": lambda lora, base, out: [
        "sample", "--base-model", base, "--prompt", f"a fox <lora:{lora.stem}:1>", "--lora-dir", lora.parent,
        "--steps", 1, "--device", "cpu", "--output", out / "a",
    ],
}  # fmt: skip
SETTINGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "train from it": lambda lora: {"init_lora_weights": str(lora)},
    "train on top of it": lambda lora: {"base_loras": [str(lora)]},
}
NO_LORA = {"extract"}
"""Commands that want another kind of file in its place, and say so of a sound LoRA too."""


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.with_name("ran"))))


def zero_the_last_third(path: Path) -> None:
    content = path.read_bytes()
    zeros = len(content) // 3
    path.write_bytes(content[:-zeros] + bytes(zeros))


def halve_a_pair(path: Path) -> None:
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith("lora_up.weight"))]
    save_file(tensors, path)


def change_a_rank(path: Path) -> None:
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key] = torch.randn(tensors[key].shape[0], 5)
    save_file(tensors, path)


def only(names: dict[str, tuple[int, ...]]) -> Callable[[Path], None]:
    return lambda path: save_file({name: torch.randn(shape) for name, shape in names.items()}, path)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    **{
        kind: (lambda path, content=FAKES[kind][0]: path.write_bytes(content), FAKES[kind][1])
        for kind in ("empty", "html", "git-lfs pointer", "gguf")
    },
    **DAMAGES,
    "zeroed tail": (zero_the_last_third, "bytes are all zero, from "),
    "NaN": (DAMAGES["NaN"][0], "NaN"),
    "pickle that would run": (write_pickle, "never loaded"),
    "torch file": (lambda path: path.write_bytes(torch_zip()), "never loaded"),
    "half a pair": (halve_a_pair, "lacks its up matrix"),
    "another rank": (change_a_rank, "is not a low-rank pair"),
    "whole model": (
        only({"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3), "first_stage_model.x": (2, 2)}),
        "a whole model; give it as base_model, not as a LoRA",
    ),
    "embedding": (only({"emb_params": (4, 768)}), "a textual-inversion embedding, not a LoRA"),
    "ControlNet": (only({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}), "a ControlNet, not a LoRA"),
    "VAE": (only({"decoder.conv_in.weight": (8, 4, 3, 3)}), "a VAE or another whole network, not a LoRA"),
    "anything": (only({"foo.weight": (4, 4)}), "is not a LoRA: none of its tensors is a pair of low-rank matrices"),
}  # fmt: skip
AS_A_MODEL = {
    "half a pair": "a LoRA file",
    "another rank": "a LoRA file",
    "NaN": "a LoRA file",
    "whole model": "without its",
    "embedding": "a textual inversion embedding",
    "ControlNet": "a ControlNet",
    "VAE": "no known kind of model",
    "anything": "no known kind of model",
}
"""What is said where a checkpoint is wanted."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lora_scripts.export.writer import write_lora

    path = tmp_path_factory.mktemp("lora") / "ink.safetensors"
    write_lora(path, random_lora(tiny_parts()), {"ss_base_model_version": "sd_v1", "ss_v2": "False"}, torch.float32)
    return path


@pytest.fixture
def lora(sound: Path, tmp_path: Path) -> Path:
    """A sound file that the test may spoil, in a folder of its own."""
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "ink.safetensors").write_bytes(sound.read_bytes())
    return folder / "ink.safetensors"


def run(
    name: str, lora: Path, base: Path, settings: Settings, tmp_path: Path, capsys: Capsys
) -> tuple[int, str, list[Path]]:
    """Exit code, what stands on standard error, and what was written."""
    out = tmp_path / "out"
    if name in SETTINGS:
        values = settings(**SETTINGS[name](lora), output_dir=str(out), max_steps=1)
        code, _, err = commands.train(values, tmp_path, capsys)
        return code, err, [path for path in out.rglob("*.safetensors") if "cache" not in path.parts]
    code, _, err = commands.command(capsys, *COMMANDS[name](lora, base, out))
    return code, err, [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", [*(name for name in COMMANDS if name not in NO_LORA), *SETTINGS])
def test_sound_file_is_taken(
    name: str, lora: Path, tiny_sd_folder: Path, settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    code, err, written = run(name, lora, tiny_sd_folder, settings, tmp_path, capsys)
    assert (code, err) == (0, "")
    assert written or name.startswith("inspect")


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", [*COMMANDS, *SETTINGS])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_ends_in_one_message(
    kind: str, name: str, lora: Path, tiny_sd_folder: Path, settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    spoil, message = BROKEN[kind]
    spoil(lora)
    code, err, written = run(name, lora, tiny_sd_folder, settings, tmp_path, capsys)
    assert code == 2
    assert str(lora) in err
    assert (AS_A_MODEL.get(kind, message) if name in NO_LORA else message) in err
    assert err.count("\n") == 1
    assert written == []
    assert not (lora.parent / "ran").exists()


def pair(name: str, down: tuple[int, ...], up: tuple[int, ...], ending: str = "lora") -> dict[str, tuple[int, ...]]:
    words = ("lora_down", "lora_up") if ending == "lora" else ("lora_A", "lora_B")
    return {f"{name}.{words[0]}.weight": down, f"{name}.{words[1]}.weight": up}


FOREIGN: dict[str, dict[str, tuple[int, ...]]] = {
    "Flux": pair("transformer.single_transformer_blocks.0.attn.to_q", (2, 3072), (3072, 2), "PEFT"),
    "a language model": pair("model.layers.0.self_attn.q_proj", (2, 64), (64, 2), "PEFT"),
    "SDXL": pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", (2, 2048), (640, 2)),
}
BESIDE_A_BASE = ["inspect beside a base", "merge into a base", "bake beside a base", "sample", *SETTINGS]


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", BESIDE_A_BASE)
@pytest.mark.parametrize("kind", FOREIGN)
def test_file_for_another_model_ends_in_one_message(
    kind: str, name: str, lora: Path, tiny_sd_folder: Path, settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    only(FOREIGN[kind])(lora)
    code, err, written = run(name, lora, tiny_sd_folder, settings, tmp_path, capsys)
    assert code == 2
    assert str(lora) in err
    assert err.count("\n") == 1
    assert written == []


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", ["convert to kohya", "convert to peft", "convert and bake", "merge", "resize", "bake"])
@pytest.mark.parametrize("kind", ["Flux", "a language model"])
def test_file_for_a_model_without_kohya_names_is_told_what_it_is(
    kind: str, name: str, lora: Path, tiny_sd_folder: Path, settings: Settings, tmp_path: Path, capsys: Capsys
) -> None:
    only(FOREIGN[kind])(lora)
    code, err, written = run(name, lora, tiny_sd_folder, settings, tmp_path, capsys)
    assert code == 2
    assert str(lora) in err
    assert f"for {kind}" in err
    assert err.count("\n") == 1
    assert written == []
