"""What each program does with our files, and with broken and foreign ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.picture_loras import rewritten, write_ours
from lora_scripts.adapter_files.adapter_file import open_adapter_file
from lora_scripts.adapter_files.owners import underscored
from lora_scripts.adapter_files.readers import READERS, Verdict, verdicts
from lora_scripts.adapter_files.reference import ARCHITECTURES, original_names

ALL = ("AUTOMATIC1111", "Forge", "ComfyUI", "InvokeAI", "diffusers")
TO_Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def judged(path: Path) -> dict[str, Verdict]:
    return {verdict.reader: verdict for verdict in verdicts(open_adapter_file(path))}


def refusing(path: Path) -> dict[str, str]:
    """Program to reason, of those that do not take the file."""
    return {name: verdict.reason for name, verdict in judged(path).items() if not verdict.ok}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ours(tmp_path_factory.mktemp("sdxl") / "ink.safetensors", "sdxl")


def test_there_is_a_table_for_each_program() -> None:
    assert tuple(reader.title for reader in READERS) == ALL


@pytest.mark.parametrize("convolutions", [False, True], ids=["LoRA", "LoCon"])
@pytest.mark.parametrize("text_encoders", [False, True], ids=["UNet alone", "with text encoders"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_file_is_taken_by_all(tmp_path: Path, architecture: str, text_encoders: bool, convolutions: bool) -> None:
    path = write_ours(
        tmp_path / "ink.safetensors", architecture, text_encoders=text_encoders, convolutions=convolutions
    )
    assert refusing(path) == {}
    assert list(judged(path)) == list(ALL)
    file = open_adapter_file(path)
    assert (file.architecture, file.alphas, file.ranks) == (architecture, (3.0,), (2,))


def without_alpha(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}


def one_misspelt(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return {key.replace(TO_Q, TO_Q.replace("attn1", "atn1")): tensor for key, tensor in tensors.items()}


def with_text_projection(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    name = "lora_te2_text_projection"
    pair = {f"{name}.lora_down.weight": torch.ones(2, 1280), f"{name}.lora_up.weight": torch.ones(1280, 2)}
    return {**tensors, **pair, f"{name}.alpha": torch.tensor(1.0)}


def with_core(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    return {
        **tensors,
        f"{name}.lora_down.weight": torch.ones(2, 320, 1, 1),
        f"{name}.lora_mid.weight": torch.ones(2, 2, 3, 3),
        f"{name}.lora_up.weight": torch.ones(320, 2, 1, 1),
    }


def names_mixed(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    diffusers = f"lora_unet_{underscored(original_names('sdxl')[TO_Q.removeprefix('lora_unet_')])}"
    return {key.replace(TO_Q, diffusers): tensor for key, tensor in tensors.items()}


def half_a_pair(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != f"{TO_Q}.lora_up.weight"}


def first_block_renamed(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return {key.replace("input_blocks_4_1", "input_blocks_4_7"): tensor for key, tensor in tensors.items()}


def with_bundled_embedding(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return {**tensors, "bundle_emb.cat.string_to_param.*": torch.ones(1, 768)}


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Mapping[str, Tensor]], dict[str, str]]] = {
    # what is wrong: how to make it, program -> part of the reason; programs that are not named take it
    "one name misspelt": (
        one_misspelt,
        {
            "AUTOMATIC1111": "leaves out 1 of",
            "Forge": "leaves out 1 of",
            "ComfyUI": "leaves out 1 of",
            "InvokeAI": "names and others are mixed",
            "diffusers": "stops at names",
        },
    ),
    "a block renamed": (
        first_block_renamed,
        {
            "AUTOMATIC1111": "leaves out",
            "Forge": "drops the whole file",
            "ComfyUI": "leaves out",
            "InvokeAI": "names and others are mixed",
            "diffusers": "stops at names",
        },
    ),
    "text_projection": (with_text_projection, {"AUTOMATIC1111": "leaves out 1 of .*text_projection"}),
    "lora_mid": (with_core, {"diffusers": "Tucker"}),
    "names mixed": (names_mixed, {"InvokeAI": "names and others are mixed"}),
    "no alpha": (without_alpha, {}),
    "half a pair": (half_a_pair, dict.fromkeys(ALL, "lacks some of its tensors")),
    "bundled embedding": (with_bundled_embedding, {"diffusers": "this one has bundle_emb"}),
}


@pytest.mark.parametrize(("change", "wanted"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_fails_the_right_programs_with_the_reason(
    sdxl: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], wanted: dict[str, str]
) -> None:
    import re

    found = refusing(rewritten(sdxl, tmp_path / "broken.safetensors", change))
    assert set(found) == set(wanted)
    for program, part in wanted.items():
        assert re.search(part, found[program]), found[program]


@pytest.mark.parametrize(
    ("metadata", "refused"),
    [
        ({"format": "pt"}, {"AUTOMATIC1111", "Forge"}),
        ({}, set()),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, set()),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, {"AUTOMATIC1111"}),
    ],
    ids=["bare header", "no header", "ss_base_model_version", "modelspec alone"],
)
def test_a_header_that_does_not_say_sdxl_hides_the_file(
    sdxl: Path, tmp_path: Path, metadata: dict[str, str], refused: set[str]
) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "bare.safetensors"
    save_file(load_file(sdxl), path, metadata or None)
    found = refusing(path)
    assert set(found) == refused
    assert all("hides it" in reason for reason in found.values())


def test_a_file_for_sd2_is_hidden_without_the_text_true(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "a.safetensors", "sd2")
    bare = rewritten(path, tmp_path / "b.safetensors", metadata={"ss_base_model_version": "sd_v2"})
    assert set(refusing(path)) == set()
    assert set(refusing(bare)) == {"AUTOMATIC1111"}


def test_other_kinds_are_refused_where_they_are_not_known(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    names = {
        "dora": {"lora_down.weight": (2, 640), "lora_up.weight": (640, 2), "dora_scale": (640, 1)},
        "lokr": {"lokr_w1": (4, 4), "lokr_w2": (160, 160)},
        "oft": {"oft_blocks": (4, 160, 160)},
    }
    wanted = {"dora": {"diffusers"}, "lokr": {"diffusers"}, "oft": {"Forge", "InvokeAI", "diffusers"}}
    for kind, parts in names.items():
        path = tmp_path / f"{kind}.safetensors"
        tensors = {f"{TO_Q}.{part}": torch.ones(shape) for part, shape in parts.items()}
        te2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
        tensors |= {f"{te2}.{part}": torch.ones(shape) for part, shape in parts.items()}
        save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})
        assert set(refusing(path)) == wanted[kind], kind
        assert all("bake" in verdict.way_on for verdict in judged(path).values() if not verdict.ok)


def test_a_file_of_another_architecture_is_not_judged(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "lora_unet_double_blocks_0_img_attn_qkv"
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}, path)
    assert verdicts(open_adapter_file(path)) == []
