"""`lora-scripts convert --bake`: what the other spelling has no place for becomes a plain LoRA on the way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.commands import command
from helpers.lora_files import changes_in, random_lora_tensors, save_lora
from helpers.tiny_diffusion import save_single_file, tiny_parts
from lora_scripts.adapters.parts import change_from_parts

Capsys = pytest.CaptureFixture[str]
PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LAYER = f"lora_unet_{PATH.replace('.', '_')}"
SIDE = 16
KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoHa": {"hada_w1_a": (SIDE, 2), "hada_w1_b": (2, SIDE), "hada_w2_a": (SIDE, 2), "hada_w2_b": (2, SIDE)},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
    "OFT": {"oft_blocks": (4, 4, 4)},
    "DoRA": {"lora_down.weight": (2, SIDE), "lora_up.weight": (SIDE, 2), "dora_scale": (SIDE, 1)},
    "full difference": {"diff": (SIDE, SIDE)},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_single_file(tiny_parts("sd15"), tmp_path_factory.mktemp("base") / "base.safetensors")


def adapter(path: Path, kind: str) -> tuple[Path, torch.Tensor]:
    """A file with one layer of the tiny model, and what it does to that layer's weight, [out, in]."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in KINDS[kind].items()}
    if kind not in ("OFT", "full difference"):
        tensors["alpha"] = torch.tensor(1.5)
    texts = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_output_name": "before"}
    save_lora(path, {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}, texts)
    weight = unet().get_submodule(PATH).weight
    return path, change_from_parts(tensors, (SIDE, SIDE)).delta(weight)


def unet() -> Any:
    return tiny_parts("sd15").unet


def loaded(output: Path, to: str) -> torch.Tensor:
    """The change that diffusers or PEFT makes of the converted file."""
    model = copy.deepcopy(unet())
    if to == "peft":
        import peft

        model = peft.PeftModel.from_pretrained(model, str(output / "unet")).base_model.model
    else:
        model.load_lora_adapter(str(output.parent), weight_name=output.name, prefix="unet")
    layers = {
        name: module.get_delta_weight(next(iter(module.lora_A))).detach()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
    }
    assert list(layers) == [PATH]
    return layers[PATH]


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_program_loads_the_baked_file_with_the_same_change(
    kind: str, to: str, base: Path, tmp_path: Path, capsys: Capsys
) -> None:
    pytest.importorskip("peft")
    file, wanted = adapter(tmp_path / "a.safetensors", kind)
    output = tmp_path / ("made" if to == "peft" else "made.safetensors")
    words = ("convert", file, "--to", to, "--output", output, "--bake", "--base-model", base)
    code, out, err = command(capsys, *words, "--keep", 1)
    assert (code, err) == (0, "")
    assert float((loaded(output, to) - wanted).norm()) <= 1e-4 * float(wanted.norm())
    assert f"{file}: {kind}, 1 layer for Stable Diffusion 1.x" in out
    assert f"in the spelling of {'PEFT' if to == 'peft' else to}" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", output.name]


def test_what_the_rank_leaves_out_is_the_least_possible_and_is_said(base: Path, tmp_path: Path, capsys: Capsys) -> None:
    file, wanted = adapter(tmp_path / "a.safetensors", "OFT")
    output = tmp_path / "made.safetensors"
    words = ("convert", file, "--to", "kohya", "--output", output, "--bake", "--base-model", base, "--rank", 3)
    code, out, err = command(capsys, *words)
    assert (code, err) == (0, "")
    lost = float(torch.linalg.svdvals(wanted)[3:].norm())
    assert float((changes_in(output)[LAYER] - wanted.double()).norm()) == pytest.approx(lost, rel=1e-4)
    assert f"keeps {1 - lost**2 / float(wanted.square().sum()):.2%}" in out
    with safe_open(output, "pt") as opened:
        texts = opened.metadata()
    assert (texts["ss_network_module"], texts["ss_output_name"]) == ("networks.lora", "made")
    assert "baked from a.safetensors (OFT)" in texts["lora_scripts.history"]


def test_plain_lora_is_copied_as_it_is_and_that_is_said(tmp_path: Path, capsys: Capsys) -> None:
    file = save_lora(tmp_path / "a.safetensors", random_lora_tensors(3, 2.0))
    made = {}
    for name, words in {"plain": (), "baked": ("--bake",)}.items():
        made[name] = tmp_path / f"{name}.safetensors"
        code, out, err = command(capsys, "convert", file, "--to", "diffusers", "--output", made[name], *words)
        assert (code, err) == (0, "")
    assert "it was a plain LoRA already" in out
    plain, baked = (load_file(path) for path in made.values())
    assert set(plain) == set(baked)
    assert all(torch.equal(plain[name], baked[name]) for name in plain)


@pytest.mark.parametrize("kind", ["OFT", "DoRA"])
def test_kind_that_depends_on_its_base_is_refused_without_it(kind: str, tmp_path: Path, capsys: Capsys) -> None:
    file, _ = adapter(tmp_path / "a.safetensors", kind)
    code, _, err = command(
        capsys, "convert", file, "--to", "diffusers", "--output", tmp_path / "made.safetensors", "--bake"
    )
    assert code == 2
    assert err.count("\n") == 1
    assert "Name the model that it was trained on with --base-model" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_refusal_of_a_kind_names_the_option(tmp_path: Path, capsys: Capsys) -> None:
    file, _ = adapter(tmp_path / "a.safetensors", "LoKr")
    code, _, err = command(capsys, "convert", file, "--to", "peft", "--output", tmp_path / "made")
    assert code == 2
    assert "is a LoKr, which a peft file has no place for. Add --bake" in err


def test_options_without_effect_are_refused(base: Path, tmp_path: Path, capsys: Capsys) -> None:
    file, _ = adapter(tmp_path / "a.safetensors", "LoHa")

    def refused(*words: object) -> str:
        code, _, err = command(capsys, "convert", file, "--output", tmp_path / "made.safetensors", *words)
        assert code == 2
        return err

    assert "--base-model, --rank: has an effect with --bake alone" in refused(
        "--to", "kohya", "--base-model", base, "--rank", 4
    )
    assert "only one of them" in refused("--to", "kohya", "--bake", "--rank", 4, "--keep", 0.9)
    assert "--force: has an effect on files alone" in refused("--to", "peft", "--force")
