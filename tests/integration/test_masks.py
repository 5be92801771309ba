"""Runs that learn parts of pictures: where masks are found, how they are cached, what check says of bad ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from helpers import seen
from helpers.checked_sets import check, found
from helpers.commands import command, train
from lora_scripts.config import RunConfig
from lora_scripts.data.dataset import open_dataset

Settings = Callable[..., dict[str, Any]]


def draw_mask(path: Path, size: tuple[int, int], box: tuple[int, int, int, int] | None) -> None:
    mask = Image.new("L", size, 0)
    if box is not None:
        ImageDraw.Draw(mask).rectangle(box, fill=255)
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)


@pytest.fixture
def masks(pictures: Path, tmp_path: Path) -> Path:
    """A mask for every picture: its left half."""
    folder = tmp_path / "masks"
    for path in sorted(pictures.glob("*.png")):
        with Image.open(path) as image:
            draw_mask(folder / path.name, image.size, (0, 0, image.width // 2, image.height))
    return folder


def opened(values: dict[str, Any]) -> Any:
    return open_dataset(RunConfig.model_validate(values), (64, 64))


def first_loss(values: dict[str, Any]) -> float:
    return seen.train(values).reports[0].losses[0]


def one_step(settings: Settings, tmp_path: Path, name: str, **changes: Any) -> dict[str, Any]:
    changes = {"batch_size": 8, "max_steps": 1, "min_snr_gamma": 0, "validation_pictures": 0} | changes
    return settings(output_dir=str(tmp_path / name / "run"), **changes)


def test_masks_are_found_by_name_in_their_folder_and_beside_the_pictures(
    settings: Settings, pictures: Path, masks: Path
) -> None:
    shutil.move(masks / "01.png", masks / "01.webp")
    shutil.move(masks / "02.png", masks / "02-masklabel.png")
    (masks / "03.png").unlink()
    data = opened(settings(masked_loss="folder", mask_dir=str(masks)))
    found_at = {each.name: each.mask.path.name if each.mask else None for each in data.examples}
    assert found_at == {
        **{f"{n:02d}.png": f"{n:02d}.png" for n in range(8)},
        "01.png": "01.webp",
        "02.png": "02-masklabel.png",
        "03.png": None,
    }
    for path in masks.iterdir():  # OneTrainer's way: beside the pictures
        shutil.copy(path, pictures / f"{path.stem.removesuffix('-masklabel')}-masklabel.png")
    beside = opened(settings(masked_loss="folder"))
    assert [each.name for each in beside.examples] == [f"{n:02d}.png" for n in range(8)]  # no mask trains as a picture
    assert sum(each.mask is not None for each in beside.examples) == 7
    assert len(opened(settings()).examples) == 8


def test_mask_folder_inside_the_pictures_is_not_trained_on(settings: Settings, pictures: Path, masks: Path) -> None:
    inside = pictures / "masks"
    shutil.move(masks, inside)
    data = opened(settings(masked_loss="folder", mask_dir=str(inside)))
    assert [each.name for each in data.examples] == [f"{n:02d}.png" for n in range(8)]
    assert all(each.mask is not None for each in data.examples)


def test_loss_is_taken_where_the_mask_is_white(settings: Settings, pictures: Path, masks: Path, tmp_path: Path) -> None:
    values = {"masked_loss": "folder", "mask_dir": str(masks)}
    plain = first_loss(one_step(settings, tmp_path, "plain"))
    left = first_loss(one_step(settings, tmp_path, "left", **values, masked_weight_outside=0))
    all_of_it = first_loss(one_step(settings, tmp_path, "all", **values, masked_weight_outside=1))
    assert all_of_it == pytest.approx(plain, rel=1e-6)
    assert 0.3 * plain < left < 0.75 * plain
    for path in masks.iterdir():
        with Image.open(path) as mask:
            inverted = mask.point(lambda value: 255 - value)
        inverted.save(path)
    right = first_loss(one_step(settings, tmp_path, "right", **values, masked_weight_outside=0))
    assert left + right == pytest.approx(plain, rel=1e-3)


def test_only_an_edited_mask_is_encoded_anew(settings: Settings, pictures: Path, masks: Path, tmp_path: Path) -> None:
    values = {"masked_loss": "folder", "mask_dir": str(masks), "flip": True}
    seen.train(one_step(settings, tmp_path, "a", **values))
    cached = pictures / ".cache" / "masks"
    before = set(cached.rglob("*.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in before}
    draw_mask(masks / "04.png", (64, 64), (3, 3, 20, 20))
    seen.train(one_step(settings, tmp_path, "b", **values))
    after = set(cached.rglob("*.safetensors"))
    assert len(after - before) == 2  # as it is, and mirrored
    assert all(path.stat().st_mtime_ns == times[path] for path in before)


def test_edited_mask_is_another_run(
    settings: Settings, pictures: Path, masks: Path, tmp_path: Path, capsys: Any
) -> None:
    values = settings(masked_loss="folder", mask_dir=str(masks), flip=True)
    assert train(values, tmp_path, capsys)[0] == 0
    moved = tmp_path / "elsewhere"
    shutil.move(masks, moved)
    assert train(values | {"mask_dir": str(moved)}, tmp_path, capsys)[0] == 0  # its place does not matter
    draw_mask(moved / "04.png", (64, 64), (3, 3, 20, 20))
    code, _, err = train(values | {"mask_dir": str(moved)}, tmp_path, capsys)
    assert code == 2
    assert "04.png: was" in err
    assert "mask" in err


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_transparency_is_a_mask_and_resumes_to_the_same_bits(
    settings: Settings, pictures: Path, masks: Path, tmp_path: Path, family: str
) -> None:
    from helpers.tiny_diffusion import save_folder, tiny_parts

    model = save_folder(tiny_parts(family), tmp_path / "model")
    for path in sorted(pictures.glob("*.png"))[:6]:
        with Image.open(path) as image, Image.open(masks / path.name) as mask:
            image = image.convert("RGB")
            image.putalpha(mask)
        image.save(path)
    changes = {"masked_loss": "alpha", "base_model": str(model), "flip": True, "save_precision": "fp32"}
    weights = []
    for name, stops in (("a", ()), ("b", (3,))):
        values = settings(output_dir=str(tmp_path / name / "run"), **changes)
        for stop in stops:
            seen.train(values, seen.StopAfter(stop))
        seen.train(values)
        weights.append(load_file(Path(values["output_dir"]) / "run.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    log = (tmp_path / "a" / "run" / "train.log").read_text("utf-8")
    assert "of 6 of 8 pictures, what they leave out counts 0.1" in log
    assert "2 of 8 pictures have no transparency and are learnt whole." in log


def test_picture_with_an_empty_mask_is_left_out_where_nothing_outside_counts(
    settings: Settings, masks: Path, tmp_path: Path
) -> None:
    draw_mask(masks / "04.png", (64, 64), None)
    values = {"masked_loss": "folder", "mask_dir": str(masks)}
    notes = seen.train(one_step(settings, tmp_path, "a", **values)).notes
    assert any("8 of 8 pictures train." in note for note in notes)
    notes = seen.train(one_step(settings, tmp_path, "b", **values, masked_weight_outside=0, batch_size=7)).notes
    assert any("7 of 8 pictures train." in note for note in notes)
    assert any("left out: 04.png: its mask is empty" in note for note in notes)


@pytest.fixture
def spoilt(masks: Path) -> Path:
    (masks / "01.png").unlink()
    draw_mask(masks / "02.png", (64, 64), None)
    draw_mask(masks / "04.png", (64, 40), (0, 0, 9, 9))
    (masks / "05.png").write_bytes(b"no picture at all")
    (masks / "07.png").write_bytes((masks / "07.png").read_bytes()[:45])
    draw_mask(masks / "typo.png", (64, 64), (0, 0, 9, 9))
    return masks


def test_check_names_bad_masks(pictures: Path, spoilt: Path) -> None:
    report = check(pictures, masked_loss="folder", mask_dir=spoilt)
    assert found(report, "masks-missing").names == ["01.png"]
    assert found(report, "masks-empty").names == ["02.png"]
    assert found(report, "masks-shape").details == {"04.png": "64x64, its mask 64x40"}
    assert found(report, "masks-unreadable").names == ["07.png", "05.png"]
    assert found(report, "masks-unused").names == ["typo.png"]
    assert report.blocked
    assert not [finding for finding in check(pictures).findings if finding.code.startswith("masks")]


def test_masks_that_fit_no_picture_block_the_run(settings: Settings, masks: Path, tmp_path: Path, capsys: Any) -> None:
    for path in list(masks.iterdir()):
        path.rename(masks / f"mask_of_{path.name}")
    code, _, err = train(settings(masked_loss="folder", mask_dir=str(masks)), tmp_path, capsys)
    assert code == 2
    assert "No picture has a mask, so masked_loss has no effect." in err
    code, out, _ = command(capsys, "check", "--config", tmp_path / "my.yaml", "--no-model", "--json")
    assert code == 2
    assert "mask_of_00.png" in out


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mask_dir": "m"}, "mask_dir: has no effect because masked_loss is none"),
        ({"masked_loss": "alpha", "mask_dir": "m"}, "mask_dir: has no effect because masked_loss is alpha"),
        ({"masked_weight_outside": 0.2}, "masked_weight_outside: has no effect because masked_loss is none"),
        ({"masked_normalize": True}, "masked_normalize: has no effect because masked_loss is none"),
        ({"masked_loss": "folder", "mask_dir": "nowhere"}, "mask_dir: nowhere: no such folder"),
        ({"masked_loss": "mask"}, "must be one of 'none', 'alpha' or 'folder'"),
        ({"folders": [{"path": "x", "mask_dir": "m"}]}, "entry 1: mask_dir: has no effect because masked_loss is none"),
        (
            {"masked_loss": "folder", "folders": [{"path": "x", "mask_dir": "m", "regularization": True}]},
            "entry 1: mask_dir: has no effect because regularization pictures are always taken whole",
        ),
    ],
)
def test_wrong_settings_are_refused(
    changes: dict[str, Any], text: str, settings: Settings, tmp_path: Path, capsys: Any
) -> None:
    code, _, err = train(settings(**changes), tmp_path, capsys)
    assert code == 2
    assert text in err
