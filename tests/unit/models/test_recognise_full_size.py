"""Single files of the real sizes, recognised by their headers: SDXL and Stable Diffusion 2, what they predict, their relatives.

The files are sparse: every name, shape and offset is the real one, and the weights take no room on the disk.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path

import pytest

from helpers.commands import command
from helpers.full_size import full_size_shapes
from lora_scripts.errors import ModelError
from lora_scripts.models.components import component_configs
from lora_scripts.models.published import published_config
from lora_scripts.models.sd_layout import LAYOUTS
from lora_scripts.models.source import resolve_base_model
from lora_scripts.models.unet_layout import UNET_PREFIX, ema_name

Shapes = dict[str, tuple[int, ...]]
Capsys = pytest.CaptureFixture[str]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="NTFS writes the whole size of a sparse file")
CLIP_L, OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
V, EPS = "v_prediction", "epsilon"


@pytest.fixture(scope="module")
def shapes() -> dict[str, Shapes]:
    return {family: full_size_shapes(family) for family in LAYOUTS}


def sparse_file(path: Path, shapes: Shapes, metadata: dict[str, str] | None = None) -> Path:
    entries: dict[str, object] = {"__metadata__": metadata or {}}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(position - 1, 1)
        file.write(b"\x3c")  # a file that ends in zeros is a download that was broken off
    return path


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("family", LAYOUTS)
def test_family_and_every_part_of_the_published_file_are_found(
    family: str, ema: bool, shapes: dict[str, Shapes], tmp_path: Path
) -> None:
    names = dict(shapes[family])
    if ema:
        names |= {ema_name(name): shape for name, shape in names.items() if name.startswith(UNET_PREFIX)}
    source = resolve_base_model(str(sparse_file(tmp_path / "model.safetensors", names)))
    assert (source.family, source.prediction_type, source.zero_terminal_snr) == (family, EPS, False)
    configs = component_configs(source)
    for part in LAYOUTS[family].components:
        assert configs[part] == published_config(part, family), part


@pytest.mark.parametrize(
    ("family", "names", "metadata", "yaml", "expected"),
    [
        ("sdxl", {"v_pred": ()}, {}, "", (V, False)),
        ("sdxl", {"v_pred": (), "ztsnr": ()}, {}, "", (V, True)),
        ("sdxl", {"v_pred": (0,), "ztsnr": (0,)}, {}, "", (V, True)),
        ("sdxl", {}, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, "", (EPS, False)),
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, "", (V, False)),
        ("sdxl", {}, {"modelspec.prediction_type": "epsilon"}, "", (EPS, False)),
        ("sdxl", {}, {}, 'model:\n  params:\n    parameterization: "v"\n    zsnr: true\n', (V, True)),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "", (V, False)),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "", (EPS, False)),
        ("sd2", {}, {}, "model:\n  params:\n    parameterization: v\n", (V, False)),
    ],
)
def test_what_a_later_model_predicts_is_read_from_keys_header_and_yaml(
    family: str,
    names: Shapes,
    metadata: dict[str, str],
    yaml: str,
    expected: tuple[str, bool],
    shapes: dict[str, Shapes],
    tmp_path: Path,
) -> None:
    path = sparse_file(tmp_path / "model.safetensors", shapes[family] | names, metadata)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    source = resolve_base_model(str(path))
    assert (source.family, source.prediction_type, source.zero_terminal_snr) == (family, *expected)
    assert source.notes == ()  # nothing is guessed


def test_a_file_of_version_2_that_says_nothing_is_taken_for_epsilon_with_a_note(
    shapes: dict[str, Shapes], tmp_path: Path
) -> None:
    source = resolve_base_model(str(sparse_file(tmp_path / "old.safetensors", shapes["sd2"])))
    assert source.prediction_type == EPS
    assert "old does not say what it predicts" in source.notes[0]
    assert "prediction: v_prediction" in source.notes[0]


def inputs(channels: int) -> Shapes:
    return {UNET_PREFIX + "input_blocks.0.0.weight": (320, channels, 3, 3)}


def without(shapes: Shapes, *prefixes: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefixes)}


def refiner(shapes: Shapes) -> Shapes:
    """The published refiner is known by its one text encoder, in the first place, and a wider first layer."""
    texts = {
        name.replace(OPEN_CLIP, "conditioner.embedders.0.model."): shape
        for name, shape in shapes.items()
        if name.startswith(OPEN_CLIP)
    }
    return without(shapes, CLIP_L, OPEN_CLIP) | texts | {UNET_PREFIX + "input_blocks.0.0.weight": (384, 4, 3, 3)}


RELATIVES = {
    "refiner": ("sdxl", refiner, "this is an SDXL refiner, which no LoRA is trained on"),
    "SDXL inpainting": ("sdxl", lambda shapes: shapes | inputs(9), "an inpainting variant (its UNet has 9 input"),
    "SDXL that edits pictures": ("sdxl", lambda shapes: shapes | inputs(8), "a variant that edits pictures"),
    "SD 2 inpainting": ("sd2", lambda shapes: shapes | inputs(9), "an inpainting variant (its UNet has 9 input"),
    "SD 2 depth": ("sd2", lambda shapes: shapes | inputs(5), "a depth variant (its UNet has 5 input channels)"),
    "unCLIP": (
        "sd2",
        lambda shapes: shapes | {UNET_PREFIX + "label_emb.0.0.weight": (1280, 2048)},
        "a Stable unCLIP model",
    ),
    "SDXL without its second text encoder": (
        "sdxl",
        lambda shapes: without(shapes, OPEN_CLIP),
        "an SDXL UNet without its text encoder 2",
    ),
    "SDXL without its VAE": ("sdxl", lambda shapes: without(shapes, "first_stage_model."), "without its VAE"),
    "SDXL's U-Net alone": (
        "sdxl",
        lambda shapes: without(shapes, "first_stage_model.", "conditioner."),
        "without its VAE and text encoder 1 and text encoder 2",
    ),
    "SD 2 without its text encoder": ("sd2", lambda shapes: without(shapes, "cond_stage_model."), "text encoder"),
}


@pytest.mark.fault(22)
@pytest.mark.parametrize("kind", RELATIVES)
def test_a_relative_or_a_part_is_named_in_one_message(
    kind: str, shapes: dict[str, Shapes], tmp_path: Path, capsys: Capsys
) -> None:
    family, change, message = RELATIVES[kind]
    path = sparse_file(tmp_path / "model.safetensors", change(shapes[family]))
    with pytest.raises(ModelError) as told:
        resolve_base_model(str(path))
    assert message in str(told.value)
    code, _, err = command(capsys, "targets", path)
    assert (code, err) == (2, f"{told.value}\n")
    assert err.count("\n") == 1


@pytest.mark.fault(22)
def test_a_half_download_of_a_real_size_says_how_much_is_missing(
    shapes: dict[str, Shapes], tmp_path: Path, capsys: Capsys
) -> None:
    path = sparse_file(tmp_path / "model.safetensors", shapes["sdxl"])
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole // 2)
    code, _, err = command(capsys, "targets", path)
    assert code == 2
    assert f"half a download: {whole - whole // 2:,} of" in err
    assert err.count("\n") == 1
