"""There and back: spellings bit by bit, the tools to the bound that they state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.commands import command
from helpers.lora_files import changes_in, random_lora_tensors, save_lora
from helpers.picture_loras import lora_weights, write_ours
from helpers.tiny_diffusion import save_single_file, tiny_parts
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.export.names import kohya_file_names, layer_shapes
from lora_scripts.export.writer import write_lora

Capsys = pytest.CaptureFixture[str]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def done(capsys: Capsys, *words: object) -> str:
    code, out, err = command(capsys, *words)
    assert (code, err) == (0, "")
    return out


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    if path.is_file():
        return load_file(path)
    files = sorted(path.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("spelling", ["diffusers", "peft"])
@pytest.mark.parametrize("architecture", ["sd15", "sd2", "sdxl"])
def test_another_spelling_comes_back_exactly_by_way_of_kohyas(
    architecture: str, spelling: str, tmp_path: Path, capsys: Capsys
) -> None:
    ending = "" if spelling == "peft" else ".safetensors"
    first, last = tmp_path / f"first{ending}", tmp_path / f"last{ending}"
    ours = write_ours(tmp_path / "ours.safetensors", architecture, convolutions=True, uneven=True)
    done(capsys, "convert", ours, "--to", spelling, "--output", first)
    done(capsys, "convert", first, "--to", "kohya", "--output", tmp_path / "between.safetensors")
    done(capsys, "convert", tmp_path / "between.safetensors", "--to", spelling, "--output", last)
    before, after = tensors_in(first), tensors_in(last)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())


def test_a_file_of_diffusers_with_a_default_alpha_comes_back_exactly(tmp_path: Path, capsys: Capsys) -> None:
    tensors = {}
    for name, lora in lora_weights("sdxl", text_encoders=False).items():
        tensors |= {f"{name}.lora_A.weight": lora.lora_A, f"{name}.lora_B.weight": lora.lora_B}
    save_file(tensors, tmp_path / "theirs.safetensors")
    done(capsys, "convert", tmp_path / "theirs.safetensors", "--to", "kohya", "--output", tmp_path / "k.safetensors")
    done(capsys, "convert", tmp_path / "k.safetensors", "--to", "diffusers", "--output", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_merged_lora_is_extracted_again_but_for_the_rounding_that_merge_states(
    family: str, dtype: str, tmp_path: Path, capsys: Capsys
) -> None:
    """At full rank: what is lost then is what the base's number format has rounded away."""
    parts = tiny_parts(family)
    base = save_single_file(parts, tmp_path / "base.safetensors", DTYPES[dtype])
    torch.manual_seed(5)
    names = kohya_file_names(parts.components, family)
    weights = {
        layer: LoRATensors(0.1 * torch.randn(2, shape[1]), 0.1 * torch.randn(shape[0], 2), 3.0)
        for layer, shape in layer_shapes(parts.components).items()
        if "attn" in layer and layer in names
    }
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, weights, {}, torch.float32, names)
    merged, again = tmp_path / "merged.safetensors", tmp_path / "again.safetensors"
    said = done(capsys, "merge", "--base-model", base, "--lora", lora, "--output", merged)
    stated = float(said.partition("% of that is rounding")[0].rpartition(" ")[2]) / 100
    done(
        capsys, "extract", "--tuned", merged, "--base-model", base, "--rank", 64, "--save-precision", "fp32",
        "--output", again,
    )  # fmt: skip
    wanted, found = changes_in(lora), changes_in(again)
    assert wanted.keys() == found.keys()
    error = sum(float((found[name] - change).square().sum()) for name, change in wanted.items()) ** 0.5
    size = sum(float(change.square().sum()) for change in wanted.values()) ** 0.5
    # Stated to a tenth of a percent, from four random inputs: these layers of 8 to 16 features are few numbers.
    assert error / size == pytest.approx(stated, rel=0.4, abs=0.001)
    assert (dtype == "fp32") == (stated == 0.0)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_file_of_rank_64_is_cut_to_16_within_the_bound_and_one_rounding(
    dtype: str, tmp_path: Path, capsys: Capsys
) -> None:
    lora = save_lora(tmp_path / "before.safetensors", random_lora_tensors(64, 20.0), dtype=DTYPES[dtype])
    after = tmp_path / "after.safetensors"
    done(capsys, "resize", lora, "--rank", 16, "--output", after)
    found = changes_in(after)
    for name, change in changes_in(lora).items():
        best = float(torch.linalg.svdvals(change.float()).double()[16:].norm())
        # Each of the two matrices is rounded once, by half a unit in the last place at most.
        rounding = torch.finfo(DTYPES[dtype]).eps * float(change.norm())
        assert best * (1 - 1e-4) <= float((found[name] - change).norm()) <= best * (1 + 1e-4) + rounding


def test_plain_lora_is_resized_to_its_own_rank_and_baked_without_loss(tmp_path: Path, capsys: Capsys) -> None:
    lora = save_lora(tmp_path / "before.safetensors", random_lora_tensors(6, 2.5))
    resized, baked = tmp_path / "resized.safetensors", tmp_path / "baked.safetensors"
    assert "nothing of the change is lost" in done(capsys, "resize", lora, "--rank", 6, "--output", resized)
    assert "nothing of the change is lost" in done(capsys, "bake", resized, "--output", baked)
    for name, change in changes_in(lora).items():
        assert float((changes_in(baked)[name] - change).norm()) <= 1e-5 * float(change.norm())
