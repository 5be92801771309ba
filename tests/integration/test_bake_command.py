"""`lora-scripts bake`: adapters of every kind as plain LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.commands import command
from helpers.lora_files import changes_in, random_lora_tensors, save_lora
from helpers.tiny_diffusion import save_single_file, tiny_parts
from lora_scripts.adapters.parts import change_from_parts

Capsys = pytest.CaptureFixture[str]
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
SIDE = 1280
HEADER = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}', "ss_base_model_version": "sd_v1"}


def bake(capsys: Capsys, lora: Path, *words: object) -> tuple[Path, str]:
    output = lora.parent / "plain.safetensors"
    code, out, err = command(capsys, "bake", lora, "--output", output, *words)
    assert (code, err) == (0, "")
    return output, out


def adapter(
    path: Path, layer: str, parts: dict[str, tuple[int, ...]], alpha: float | None = 2.0
) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in parts.items()}
    tensors |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
    save_lora(path, {f"{layer}.{name}": tensor for name, tensor in tensors.items()}, HEADER)
    return path, tensors


@pytest.mark.parametrize(
    ("parts", "rank"),
    [
        ({"hada_w1_a": (SIDE, 3), "hada_w1_b": (3, SIDE), "hada_w2_a": (SIDE, 3), "hada_w2_b": (3, SIDE)}, 9),
        ({"lokr_w1": (8, 8), "lokr_w2_a": (160, 2), "lokr_w2_b": (2, 160)}, 16),
    ],
    ids=["LoHa", "LoKr"],
)
def test_loha_and_lokr_of_low_rank_lose_nothing(
    parts: dict[str, tuple[int, ...]], rank: int, tmp_path: Path, capsys: Capsys
) -> None:
    lora, tensors = adapter(tmp_path / "a.safetensors", LAYER, parts)
    output, out = bake(capsys, lora, "--rank", rank)
    wanted = change_from_parts(tensors, (SIDE, SIDE)).delta().double()
    assert float((changes_in(output)[LAYER] - wanted).norm()) <= 1e-6 * float(wanted.norm())
    assert f"plain LoRA of rank {rank}; nothing of the change is lost" in out


def test_by_default_what_is_left_out_is_at_most_a_twentieth_as_long_as_the_change(
    tmp_path: Path, capsys: Capsys
) -> None:
    parts = {"hada_w1_a": (SIDE, 8), "hada_w1_b": (8, SIDE), "hada_w2_a": (SIDE, 8), "hada_w2_b": (8, SIDE)}
    lora, tensors = adapter(tmp_path / "a.safetensors", LAYER, parts)
    output, _ = bake(capsys, lora)
    wanted = change_from_parts(tensors, (SIDE, SIDE)).delta().double()
    lost = float((changes_in(output)[LAYER] - wanted).norm() / wanted.norm())
    assert lost <= 0.05
    with safe_open(output, "pt") as file:
        texts = file.metadata()
    assert (texts["ss_network_module"], texts["ss_network_args"]) == ("networks.lora", "{}")
    assert "baked from a.safetensors (LoHa)" in texts["lora_scripts.history"]


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "dora_scale": (16, 1)},
        {"oft_blocks": (4, 4, 4)},
    ],
    ids=["DoRA", "OFT"],
)
def test_dora_and_oft_are_baked_beside_their_base(
    parts: dict[str, tuple[int, ...]], tmp_path: Path, capsys: Capsys
) -> None:
    model = tiny_parts("sd15")
    base = save_single_file(model, tmp_path / "base.safetensors")
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    lora, tensors = adapter(tmp_path / "a.safetensors", layer, parts, None if "oft_blocks" in parts else 2.0)
    output, out = bake(capsys, lora, "--base-model", base, "--rank", 5)
    weight = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    wanted = change_from_parts(tensors, (16, 16)).delta(weight)
    best = float(torch.linalg.svdvals(wanted)[5:].norm())
    assert float((changes_in(output)[layer] - wanted.double()).norm()) == pytest.approx(best, rel=1e-4)
    assert f"keeps {1 - best**2 / float(wanted.square().sum()):.2%}" in out


def test_dora_without_its_base_is_refused(tmp_path: Path, capsys: Capsys) -> None:
    parts = {"lora_down.weight": (2, SIDE), "lora_up.weight": (SIDE, 2), "dora_scale": (SIDE, 1)}
    lora, _ = adapter(tmp_path / "a.safetensors", LAYER, parts)
    code, _, err = command(capsys, "bake", lora, "--output", tmp_path / "plain.safetensors")
    assert code == 2
    assert "--base-model" in err


def test_plain_lora_keeps_its_rank_and_its_change(tmp_path: Path, capsys: Capsys) -> None:
    lora = save_lora(tmp_path / "a.safetensors", random_lora_tensors(6, 2.5))
    output, out = bake(capsys, lora)
    for name, change in changes_in(lora).items():
        torch.testing.assert_close(changes_in(output)[name], change, atol=1e-7, rtol=1e-5)
    assert {float(tensor) for name, tensor in load_file(output).items() if name.endswith("alpha")} == {6.0}
    assert "nothing of the change is lost" in out
