"""`lora-scripts extract`: a LoRA from a tuned checkpoint and its base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.commands import command
from helpers.lora_files import changes_in
from helpers.tiny_diffusion import save_folder, save_single_file, tiny_parts
from lora_scripts.export.names import kohya_file_names, layer_shapes

Capsys = pytest.CaptureFixture[str]


def two(
    family: str,
    folder: Path,
    *,
    layout: str = "file",
    tuned: tuple[str, ...] = ("",),
    rank: int | None = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """(tuned, base, change by name in a kohya file); layers whose name holds one of `tuned` are changed."""
    paths, changes = [], {}
    for name in ("base", "tuned"):
        parts = tiny_parts(family)
        if name == "tuned":
            names = kohya_file_names(parts.components, family)
            generator = torch.Generator().manual_seed(1)
            for layer, shape in layer_shapes(parts.components).items():
                if layer not in names or not any(word in layer for word in tuned):
                    continue
                component, _, path = layer.partition(".")
                weight = parts.components[component].get_submodule(path).weight
                columns = weight[0].numel()
                inner = rank or min(len(weight), columns)
                change = torch.randn(len(weight), inner, generator=generator) @ torch.randn(
                    inner, columns, generator=generator
                )
                changes[names[layer]] = 0.1 * change
                weight.add_(0.1 * change.reshape(shape))
        paths.append(
            save_single_file(parts, folder / f"{name}.safetensors", dtype)
            if layout == "file"
            else save_folder(parts, folder / name)
        )
    return paths[1], paths[0], changes


def extract(capsys: Capsys, tuned: Path, base: Path, *words: object) -> tuple[Path, str]:
    output = base.parent / "lora.safetensors"
    code, out, err = command(
        capsys,
        "extract",
        "--tuned",
        tuned,
        "--base-model",
        base,
        "--output",
        output,
        "--save-precision",
        "fp32",
        *words,
    )
    assert (code, err) == (0, "")
    return output, out


def refused(capsys: Capsys, tuned: Path, base: Path, *words: object) -> str:
    output = base.parent / "lora.safetensors"
    code, _, err = command(capsys, "extract", "--tuned", tuned, "--base-model", base, "--output", output, *words)
    assert code == 2
    assert "Traceback" not in err
    assert not output.exists()
    return err.strip()


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
def test_change_of_low_rank_comes_back_in_full(family: str, layout: str, tmp_path: Path, capsys: Capsys) -> None:
    tuned, base, changes = two(family, tmp_path, layout=layout, tuned=("attn", "proj"))
    output, out = extract(capsys, tuned, base, "--rank", 2)
    found = changes_in(output)
    assert set(found) == {name for name in changes if "attn" in name}
    for name, change in found.items():
        assert float((change - changes[name].double()).norm()) <= 1e-4 * float(change.norm())
    assert "nothing of the change is lost" in out


def test_change_of_full_rank_is_cut_as_well_as_possible_and_the_loss_is_stated(tmp_path: Path, capsys: Capsys) -> None:
    tuned, base, changes = two("sdxl", tmp_path, rank=None)
    output, out = extract(capsys, tuned, base, "--rank", 4, "--conv-rank", 3, "--layers", "all", "--report")
    ranks = {name: tensor.shape[0] for name, tensor in load_file(output).items() if name.endswith("lora_down.weight")}
    lost = size = 0.0
    for name, change in changes_in(output).items():
        wanted = changes[name].double()
        rank = ranks[f"{name}.lora_down.weight"]
        best = float(torch.linalg.svdvals(wanted)[rank:].norm())
        assert float((change - wanted).norm()) == pytest.approx(best, rel=1e-3, abs=1e-5 * float(wanted.norm()))
        lost, size = lost + best**2, size + float(wanted.square().sum())
    convolutions = [rank for name, rank in ranks.items() if "in_layers_2" in name or "out_layers_3" in name]
    assert set(convolutions) == {3}
    kept = float(out.partition("difference: keeps ")[2].partition("%")[0])
    assert kept == pytest.approx(100 * (1 - lost / size), abs=0.02)


def test_share_of_the_difference_in_other_layers_is_stated(tmp_path: Path, capsys: Capsys) -> None:
    tuned, base, changes = two("sd15", tmp_path, tuned=("attn1.to_q", "resnets.0.conv1"))
    _, out = extract(capsys, tuned, base, "--rank", 2)
    outside = sum(float(change.square().sum()) for name, change in changes.items() if "resnets" in name)
    whole = sum(float(change.square().sum()) for change in changes.values())
    assert f"{outside / whole:.1%} of the checkpoints' whole difference" in out


def test_layers_that_are_equal_are_left_out_also_across_number_formats(tmp_path: Path, capsys: Capsys) -> None:
    tuned, base, _ = two("sd15", tmp_path, tuned=("attn1.to_q",))
    with safe_open(tuned, "pt") as file:
        metadata = file.metadata()
    half = {name: t.half() if t.is_floating_point() else t for name, t in load_file(tuned).items()}
    save_file(half, tuned, metadata)
    output, out = extract(capsys, tuned, base, "--rank", 2)
    assert changes_in(output)
    assert all("attn1_to_q" in name for name in changes_in(output))
    assert "more are equal in both" in out


def test_header_says_the_base_model(tmp_path: Path, capsys: Capsys) -> None:
    tuned, base, _ = two("sdxl", tmp_path)
    output, _ = extract(capsys, tuned, base, "--rank", 2)
    with safe_open(output, "pt") as file:
        texts = file.metadata()
    assert texts["ss_base_model_version"] == "sdxl_base_v1-0"
    assert texts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (texts["ss_network_dim"], texts["ss_sd_model_name"], texts["ss_output_name"]) == ("2", "base", "lora")
    assert "extracted from tuned less base" in texts["lora_scripts.history"]


def test_same_checkpoint_twice_and_different_architectures_are_told(tmp_path: Path, capsys: Capsys) -> None:
    tuned, base, _ = two("sd15", tmp_path, tuned=("resnets",))
    assert "equal in every layer asked for" in refused(capsys, tuned, base, "--rank", 2)
    assert "hold the same weights" in refused(capsys, base, base, "--rank", 2)
    (tmp_path / "xl").mkdir()
    other, _, _ = two("sdxl", tmp_path / "xl")
    assert "the first is SDXL, the second Stable Diffusion 1.x" in refused(capsys, other, base, "--rank", 2)
    assert "--conv-rank" in refused(capsys, tuned, base, "--rank", 2, "--conv-rank", 2)


def test_extracted_lora_merged_into_the_base_gives_the_tuned_model(tmp_path: Path, capsys: Capsys) -> None:
    tuned, base, _ = two("sdxl", tmp_path, tuned=("attn",))
    output, _ = extract(capsys, tuned, base, "--rank", 2)
    code, _, err = command(
        capsys, "merge", "--base-model", base, "--lora", output, "--output", tmp_path / "again.safetensors"
    )
    assert (code, err) == (0, "")
    wanted, found = load_file(tuned), load_file(tmp_path / "again.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
