"""`lora-scripts merge` into Stable Diffusion 1, 2 and SDXL: the numbers, the files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.commands import command
from helpers.lora_files import save_lora
from helpers.tiny_diffusion import save_folder, save_single_file, tiny_parts
from lora_scripts.export.names import kohya_file_names, layer_shapes
from lora_scripts.models.source import resolve_base_model
from lora_scripts.models.stable_diffusion import load_stable_diffusion

Capsys = pytest.CaptureFixture[str]
FAMILIES = ("sd15", "sd2", "sdxl")


def saved(folder: Path, family: str, layout: str, dtype: torch.dtype = torch.float32) -> Path:
    parts = tiny_parts(family)
    return (
        save_single_file(parts, folder / "base.safetensors", dtype)
        if layout == "file"
        else save_folder(parts, folder / "base")
    )


def modules(base: Path) -> dict[str, Any]:
    parts = load_stable_diffusion(resolve_base_model(str(base)), "cpu", torch.float32)
    return dict(parts.components)


def kohya_lora(
    base: Path, family: str, rank: int = 2, seed: int = 0, size: float = 0.3
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors for every layer of U-Net and text encoders, and layer -> name in the file."""
    components = modules(base)
    names = kohya_file_names(components, family)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (out, inside, *kernel) in layer_shapes(components).items():
        if layer not in names:
            continue
        tensors[f"{names[layer]}.lora_down.weight"] = size * torch.randn(rank, inside, *kernel, generator=generator)
        tensors[f"{names[layer]}.lora_up.weight"] = size * torch.randn(
            out, rank, *[1] * len(kernel), generator=generator
        )
        tensors[f"{names[layer]}.alpha"] = torch.tensor(3.0)
    return tensors, names


def merge(capsys: Capsys, base: Path, output: Path, *words: object) -> str:
    code, out, err = command(capsys, "merge", "--base-model", base, "--output", output, *words)
    assert (code, err) == (0, "")
    return out


def refused(capsys: Capsys, base: object, output: Path, *words: object) -> str:
    code, _, err = command(capsys, "merge", "--base-model", base, "--output", output, *words)
    assert code == 2
    assert "Traceback" not in err
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]
    return err.strip()


def weight_of(components: dict[str, Any], layer: str) -> torch.Tensor:
    component, _, path = layer.partition(".")
    weight: torch.Tensor = components[component].get_submodule(path).weight
    return weight


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_merged_model_is_base_plus_the_weighted_change(
    family: str, layout: str, tmp_path: Path, capsys: Capsys
) -> None:
    base = saved(tmp_path, family, layout)
    tensors, names = kohya_lora(base, family)
    lora = save_lora(tmp_path / "lora.safetensors", tensors, {})
    output = tmp_path / ("merged.safetensors" if layout == "file" else "merged")
    out = merge(capsys, base, output, "--lora", lora, "--weight", 0.7)
    before, after = modules(base), modules(output)
    for layer, shape in layer_shapes(before).items():
        old, new = weight_of(before, layer), weight_of(after, layer)
        if layer not in names:
            assert torch.equal(old, new)
            continue
        down, up = (tensors[f"{names[layer]}.lora_{end}.weight"].double() for end in ("down", "up"))
        change = (0.7 * 3 / 2 * up.flatten(1) @ down.flatten(1)).reshape(shape)
        torch.testing.assert_close(new, (old.double() + change).float(), atol=1e-6, rtol=1e-6)
    assert f"read back, {len(names)} layers are base + LoRA" in out


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_lora_changes_keeps_every_byte_and_its_dtype(family: str, tmp_path: Path, capsys: Capsys) -> None:
    base = saved(tmp_path, family, "file", torch.bfloat16)
    tensors, names = kohya_lora(base, family)
    layer = next(name for name in names.values() if "attn1_to_q" in name)
    lora = save_lora(
        tmp_path / "lora.safetensors", {key: t for key, t in tensors.items() if key.startswith(layer + ".")}, {}
    )
    merge(capsys, base, tmp_path / "merged.safetensors", "--lora", lora)
    before, after = load_file(base), load_file(tmp_path / "merged.safetensors")
    assert list(before) == list(after)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 1
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    with safe_open(base, "pt") as old, safe_open(tmp_path / "merged.safetensors", "pt") as new:
        kept = {key: value for key, value in old.metadata().items() if key != "modelspec.title"}
        assert kept.items() <= new.metadata().items()
        assert "lora at 1" in new.metadata()["lora_scripts.history"]


def test_merging_at_a_weight_and_taking_it_off_again_is_off_by_two_roundings(tmp_path: Path, capsys: Capsys) -> None:
    base = saved(tmp_path, "sd15", "file", torch.float16)
    lora = save_lora(tmp_path / "lora.safetensors", kohya_lora(base, "sd15")[0], {})
    merge(capsys, base, tmp_path / "there.safetensors", "--lora", lora, "--weight", 0.6)
    merge(capsys, tmp_path / "there.safetensors", tmp_path / "back.safetensors", "--lora", lora, "--weight", -0.6)
    there, back = load_file(tmp_path / "there.safetensors"), load_file(tmp_path / "back.safetensors")
    eps = torch.finfo(torch.float16).eps
    for name, old in load_file(base).items():
        if old.is_floating_point():
            bound = eps / 2 * (there[name].float().abs() + back[name].float().abs()) + 1e-7
            # Float32 sums before the rounding, of numbers as large as the change itself.
            bound += 1e-6 * (old.float().abs() + there[name].float().abs())
            assert ((back[name].float() - old.float()).abs() <= bound).all(), name


def test_two_loras_are_added_before_one_rounding(tmp_path: Path, capsys: Capsys) -> None:
    base = saved(tmp_path, "sdxl", "file", torch.bfloat16)
    first, names = kohya_lora(base, "sdxl", seed=1)
    second, _ = kohya_lora(base, "sdxl", rank=3, seed=2)
    files = [save_lora(tmp_path / f"{i}.safetensors", tensors, {}) for i, tensors in enumerate((first, second))]
    merge(capsys, base, tmp_path / "merged.safetensors", "--lora", files[0], "--lora", files[1], "--weight", -0.5)
    before, after = modules(base), modules(tmp_path / "merged.safetensors")
    for layer, name in names.items():
        old = weight_of(before, layer)
        change = torch.zeros_like(old)
        for tensors, rank in ((first, 2), (second, 3)):
            down, up = (tensors[f"{name}.lora_{end}.weight"].flatten(1) for end in ("down", "up"))
            change += (-0.5 * 3 / rank * up @ down).reshape(old.shape)
        wanted = (old + change).bfloat16().float()
        near = (weight_of(after, layer) - wanted).abs() <= torch.finfo(torch.bfloat16).eps * wanted.abs() + 1e-6
        assert near.all()
        assert (weight_of(after, layer) == wanted).float().mean() > 0.95


KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoHa": {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16), "alpha": ()},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (4, 4), "alpha": ()},
    "DoRA": {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "dora_scale": (16, 1), "alpha": ()},
    "OFT": {"oft_blocks": (4, 4, 4), "alpha": ()},
    "full difference": {"diff": (16, 16)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_adapter_is_merged_by_its_change(kind: str, tmp_path: Path, capsys: Capsys) -> None:
    from lora_scripts.adapters.parts import change_from_parts

    base = saved(tmp_path, "sdxl", "file")
    layer = "text_encoder_2.encoder.layers.1.self_attn.k_proj"  # a third of what OpenCLIP's files hold in one piece
    name = kohya_file_names(modules(base), "sdxl")[layer]
    generator = torch.Generator().manual_seed(0)
    parts = {part: torch.randn(shape, generator=generator) for part, shape in KINDS[kind].items()}
    parts |= {"alpha": torch.tensor(0.0 if kind == "OFT" else 2.0)} if "alpha" in parts else {}
    parts |= {"dora_scale": parts["dora_scale"].abs()} if "dora_scale" in parts else {}
    lora = save_lora(tmp_path / "lora.safetensors", {f"{name}.{part}": tensor for part, tensor in parts.items()}, {})
    out = merge(capsys, base, tmp_path / "merged.safetensors", "--lora", lora, "--weight", 0.5)
    before, after = modules(base), modules(tmp_path / "merged.safetensors")
    old = weight_of(before, layer)
    wanted = old + 0.5 * change_from_parts(parts, (16, 16)).delta(old)
    torch.testing.assert_close(weight_of(after, layer), wanted, atol=1e-5, rtol=1e-5)
    for sibling in ("q_proj", "v_proj"):
        other = layer.replace("k_proj", sibling)
        assert torch.equal(weight_of(before, other), weight_of(after, other))
    assert f": {kind}, 1 layers" in out


def test_running_average_is_left_out(tmp_path: Path, capsys: Capsys) -> None:
    base = saved(tmp_path, "sd15", "file")
    tensors = load_file(base)
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion")
    }
    with safe_open(base, "pt") as file:
        metadata = file.metadata()
    save_file(tensors | average, base, metadata)
    lora = save_lora(tmp_path / "lora.safetensors", kohya_lora(base, "sd15")[0], {})
    out = merge(capsys, base, tmp_path / "merged.safetensors", "--lora", lora)
    assert list(load_file(tmp_path / "merged.safetensors")) == list(tensors)
    assert "running average" in out


def test_folder_keeps_what_else_belongs_to_the_model(tmp_path: Path, capsys: Capsys) -> None:
    base = saved(tmp_path, "sdxl", "folder")
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another copy of the weights")
    (base / "LICENSE.md").write_text("free")
    lora = save_lora(tmp_path / "lora.safetensors", kohya_lora(base, "sdxl")[0], {})
    merge(capsys, base, tmp_path / "merged", "--lora", lora)
    before = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    after = {path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    assert before - after == {Path("unet/diffusion_pytorch_model.fp16.safetensors")}
    assert not after - before


def test_loss_of_the_addition_is_found_by_the_check(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path, "sd2", "file")
    lora = save_lora(tmp_path / "lora.safetensors", kohya_lora(base, "sd2")[0], {})
    monkeypatch.setattr("lora_scripts.merging.stream.add_changes", lambda weight, changes: None)
    assert "is not base + LoRA" in refused(capsys, base, tmp_path / "merged.safetensors", "--lora", lora)


def test_lora_of_zeros_is_said_to_change_nothing(tmp_path: Path, capsys: Capsys) -> None:
    base = saved(tmp_path, "sd15", "file")
    tensors = {key: t * 0 if "lora_up" in key else t for key, t in kohya_lora(base, "sd15")[0].items()}
    lora = save_lora(tmp_path / "lora.safetensors", tensors, {})
    assert "changes nothing" in refused(capsys, base, tmp_path / "merged.safetensors", "--lora", lora)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, capsys: Capsys) -> None:
    base = saved(tmp_path, "sd15", "file")
    (tmp_path / "xl").mkdir()
    other = saved(tmp_path / "xl", "sdxl", "file")
    lora = save_lora(tmp_path / "lora.safetensors", kohya_lora(other, "sdxl")[0], {})
    output = tmp_path / "merged.safetensors"
    assert "was made for SDXL" in refused(capsys, base, output, "--lora", lora)
    assert "which is read" in refused(capsys, base, base, "--lora", lora, "--force")
    assert "no such LoRA" in refused(capsys, base, output, "--lora", tmp_path / "nowhere.safetensors")
    output.write_bytes(b"older")
    assert "--force" in refused(capsys, base, output, "--lora", lora)
    base.write_bytes(base.read_bytes()[:-4096])
    assert "half a download" in refused(capsys, base, output, "--lora", lora, "--force")
    assert output.read_bytes() == b"older"


def test_number_that_outgrows_half_precision_is_found(tmp_path: Path, capsys: Capsys) -> None:
    base = saved(tmp_path, "sd15", "file", torch.float16)
    lora = save_lora(tmp_path / "lora.safetensors", kohya_lora(base, "sd15", size=200.0)[0], {})
    err = refused(capsys, base, tmp_path / "merged.safetensors", "--lora", lora, "--weight", 10)
    assert "NaN or infinite" in err
    assert not (tmp_path / "merged.safetensors").exists()
