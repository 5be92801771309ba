"""`lora-scripts merge` without a base model: several LoRAs become one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.commands import command
from helpers.lora_files import LAYERS, METADATA, changes_in, random_lora_tensors, save_lora

Capsys = pytest.CaptureFixture[str]
DIFFUSERS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    first = save_lora(tmp_path / "first.safetensors", random_lora_tensors(8, 5.0, seed=1))
    fewer = dict(list(LAYERS.items())[1:])
    second = save_lora(
        tmp_path / "second.safetensors",
        random_lora_tensors(12, 4.0, layers=fewer, seed=2),
        METADATA | {"modelspec.trigger_phrase": "sks cat", "ss_steps": "900"},
    )
    return first, second


def merge(capsys: Capsys, output: Path, *words: object, code: int = 0) -> str:
    found, out, err = command(capsys, "merge", "--output", output, *words)
    assert found == code
    assert "Traceback" not in err
    return out if code == 0 else err.strip()


def sums(two: tuple[Path, Path], weights: tuple[float, float]) -> dict[str, torch.Tensor]:
    first, second = (changes_in(path) for path in two)
    return {name: weights[0] * change + weights[1] * second.get(name, torch.zeros(1)) for name, change in first.items()}


def test_concatenation_is_the_weighted_sum_and_says_so(two: tuple[Path, Path], tmp_path: Path, capsys: Capsys) -> None:
    output = tmp_path / "both.safetensors"
    out = merge(capsys, output, "--lora", two[0], "--weight", 0.7, "--lora", two[1], "--weight", -0.4)
    merged = changes_in(output)
    for name, wanted in sums(two, (0.7, -0.4)).items():
        assert float((merged[name] - wanted).norm()) <= 1e-6 * float(wanted.norm())
    assert "rank 8, 20; the exact sum" in out
    assert {float(tensor) for name, tensor in load_file(output).items() if name.endswith("alpha")} == {20.0}


def test_svd_cuts_the_sum_as_well_as_any_lora_of_that_rank_can(
    two: tuple[Path, Path], tmp_path: Path, capsys: Capsys
) -> None:
    output = tmp_path / "both.safetensors"
    out = merge(capsys, output, "--lora", two[0], "--lora", two[1], "--method", "svd", "--rank", 6)
    lost = size = 0.0
    merged = changes_in(output)
    for name, wanted in sums(two, (1.0, 1.0)).items():
        best = float(torch.linalg.svdvals(wanted.float())[6:].norm())
        assert float((merged[name] - wanted).norm()) == pytest.approx(best, rel=1e-4)
        lost, size = lost + best**2, size + float(wanted.square().sum())
    assert f"keeps {1 - lost / size:.2%} of the squared Frobenius norm" in out


def test_header_holds_what_is_true_of_both(two: tuple[Path, Path], tmp_path: Path, capsys: Capsys) -> None:
    output = tmp_path / "both.safetensors"
    merge(capsys, output, "--lora", two[0], "--lora", two[1])
    with safe_open(output, "pt") as file:
        texts = file.metadata()
    assert texts["modelspec.trigger_phrase"] == "inkwash, sks cat"
    assert texts["ss_base_model_version"] == "sd_v1"
    assert (texts["ss_network_dim"], texts["ss_output_name"]) == ("20", "both")
    assert "first at 1, second at 1" in texts["lora_scripts.history"]
    assert not {"ss_steps", "ss_tag_frequency"} & set(texts)


def test_files_in_two_spellings_meet_in_one_layer(two: tuple[Path, Path], tmp_path: Path, capsys: Capsys) -> None:
    generator = torch.Generator().manual_seed(3)
    pair = {"A": torch.randn(2, 320, generator=generator), "B": torch.randn(320, 2, generator=generator)}
    other = save_lora(
        tmp_path / "other.safetensors", {f"{DIFFUSERS}.lora_{end}.weight": t for end, t in pair.items()}, {}
    )
    output = tmp_path / "both.safetensors"
    merge(capsys, output, "--lora", two[0], "--lora", other)
    wanted = changes_in(two[0])[TO_Q] + pair["B"].double() @ pair["A"].double()
    torch.testing.assert_close(changes_in(output)[TO_Q], wanted, atol=1e-5, rtol=1e-5)


def test_merging_at_a_weight_and_then_at_its_negative_gives_nothing(
    two: tuple[Path, Path], tmp_path: Path, capsys: Capsys
) -> None:
    err = merge(
        capsys, tmp_path / "none.safetensors",
        "--lora", two[0], "--weight", 0.5, "--lora", two[0], "--weight", -0.5, "--method", "svd", "--rank", 4,
        code=2,
    )  # fmt: skip
    assert "failed" in err


def test_file_for_another_model_is_refused(two: tuple[Path, Path], tmp_path: Path, capsys: Capsys) -> None:
    layers = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)}
    sdxl = save_lora(tmp_path / "xl.safetensors", random_lora_tensors(4, 4.0, layers=layers), {})
    err = merge(capsys, tmp_path / "both.safetensors", "--lora", two[0], "--lora", sdxl, code=2)
    assert "Stable Diffusion 1.x" in err
    assert "SDXL" in err
    assert not (tmp_path / "both.safetensors").exists()


def test_options_without_effect_are_refused(two: tuple[Path, Path], tmp_path: Path, capsys: Capsys) -> None:
    output = tmp_path / "both.safetensors"
    assert "needs --rank" in merge(capsys, output, "--lora", two[0], "--lora", two[1], "--method", "svd", code=2)
    assert "sum of the ranks" in merge(
        capsys, output, "--lora", two[0], "--lora", two[1], "--method", "concat", "--rank", 4, code=2
    )
    assert "--weight is given 3 times" in merge(
        capsys, output, "--lora", two[0], "--lora", two[1], "--weight", 1, "--weight", 1, "--weight", 1, code=2
    )
    base = ("--base-model", "builtin:mini-sd.safetensors", "--rank", 4)
    assert "--rank: has an effect without --base-model" in merge(capsys, output, "--lora", two[0], *base, code=2)
