"""Writing a LoRA file and the card beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import ExportError
from lora_scripts.export.kohya import to_kohya
from lora_scripts.export.sidecar import write_preview, write_sidecar
from lora_scripts.export.writer import write_lora
from lora_scripts.sampling.infotext import read_infotext


def weights(alpha: float = 3.0, **changes: torch.Tensor) -> dict[str, LoRATensors]:
    torch.manual_seed(0)
    pair = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(4, 2), **changes}
    return {"unet.a.to_q": LoRATensors(**pair, alpha=alpha)}


def test_same_weights_and_texts_give_the_same_bytes(tmp_path: Path) -> None:
    texts = {f"ss_{index}": str(index) for index in range(30)}
    for name in ("a", "b"):
        write_lora(tmp_path / f"{name}.safetensors", weights(), texts, torch.float16)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_file_has_the_dtype_asked_for_and_an_exact_alpha(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(path, weights(alpha=10.7), {"ss_v2": "False"}, torch.float16)
    tensors = load_file(path)
    assert tensors["lora_unet_a_to_q.lora_down.weight"].dtype == torch.float16
    assert float(tensors["lora_unet_a_to_q.alpha"]) == pytest.approx(10.7, rel=1e-7)
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_v2"] == "False"


@pytest.mark.fault(28)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"the older file")
    with pytest.raises(ExportError, match=r"Export failed.*lora_B of unet\.a\.to_q.*not finite"):
        write_lora(path, weights(lora_B=torch.full((4, 2), value)), {}, torch.float16)
    assert path.read_bytes() == b"the older file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_numbers_too_large_for_fp16_are_refused_with_the_way_on(tmp_path: Path) -> None:
    big = weights(lora_A=torch.full((2, 4), 1e5))
    with pytest.raises(ExportError, match=r"too large for float16.*save_precision to bf16"):
        write_lora(tmp_path / "a.safetensors", big, {}, torch.float16)
    write_lora(tmp_path / "a.safetensors", big, {}, torch.bfloat16)


def test_symbolic_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / "a.safetensors").symlink_to(target)
    with pytest.raises(ExportError, match=r"Export failed.*symbolic link"):
        write_lora(tmp_path / "a.safetensors", weights(), {}, torch.float16)
    assert target.read_bytes() == b"precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_fails_with_the_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ExportError, match=r"Export failed.*permissions"):
            write_lora(tmp_path / "a.safetensors", weights(), {}, torch.float16)
    finally:
        tmp_path.chmod(0o700)


def test_part_without_a_place_in_the_file_and_no_layers_are_refused() -> None:
    with pytest.raises(ExportError, match=r"Export failed: a kohya file of this model has no place for vae\.x"):
        to_kohya({"vae.x": weights()["unet.a.to_q"]}, None, torch.float32)
    with pytest.raises(ExportError, match="no LoRA layer to write"):
        to_kohya({}, None, torch.float32)


def test_two_layers_of_one_name_in_the_file_are_refused() -> None:
    one = weights()["unet.a.to_q"]
    with pytest.raises(ExportError, match=r"unet\.a_to\.q and unet\.a\.to_q would both be called lora_unet_a_to_q"):
        to_kohya({"unet.a.to_q": one, "unet.a_to.q": one}, None, torch.float32)


def test_sidecar_has_the_webuis_fields(tmp_path: Path) -> None:
    path = write_sidecar(
        tmp_path / "ink.safetensors", base_model_version="sd_v1", activation_text="水墨 ink wash", preferred_weight=0.8
    )
    assert path == tmp_path / "ink.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "description": "",
        "sd version": "SD1",
        "activation text": "水墨 ink wash",
        "preferred weight": 0.8,
        "negative text": "",
        "notes": "",
    }


def test_sidecar_keeps_what_the_user_wrote(tmp_path: Path) -> None:
    lora = tmp_path / "ink.safetensors"
    path = write_sidecar(lora, base_model_version="sd_v1", description="first")
    values = {**json.loads(path.read_text()), "notes": "best at 0.6", "rating": 5}
    path.write_text(json.dumps(values))
    write_sidecar(lora, base_model_version="sd_v1", description="second", activation_text="ink", notes="ours")
    found = json.loads(path.read_text())
    assert (found["notes"], found["rating"], found["description"]) == ("best at 0.6", 5, "first")
    assert found["activation text"] == "ink"


def test_preview_carries_its_prompt(tmp_path: Path) -> None:
    path = write_preview(tmp_path / "ink.safetensors", Image.new("RGB", (8, 8)), "a fox\nSteps: 1, Seed: 2, Size: 8x8")
    assert path == tmp_path / "ink.png"
    found = read_infotext(path)
    assert found is not None
    assert found.prompt == "a fox"
