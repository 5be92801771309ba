from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from helpers.checked_sets import check, clean_set, found, spoil
from lora_scripts.builtin.world import STYLES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clean_set(tmp_path / "pictures", 10)
    return tmp_path / "pictures"


def test_clean_set_gives_no_finding(folder: Path) -> None:
    report = check(folder)
    assert report.findings == []
    assert (report.num_trained, report.num_examples) == (10, 10)


@pytest.mark.parametrize("style", STYLES)
def test_drawn_styles_give_nothing_red_and_none_is_taken_for_blurred_or_dark(style: str, tmp_path: Path) -> None:
    clean_set(tmp_path, 12, style=style)
    codes = {finding.code for finding in check(tmp_path).findings}
    # The seal in the corner of an ink wash is a mark indeed.
    assert codes <= {"common-mark"}
    assert ("common-mark" in codes) == (style == "ink wash")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def test_one_truncated_picture_of_few_is_named_with_its_reason_and_does_not_block(folder: Path) -> None:
    cut(folder / "03.png")
    report = check(folder)
    finding = found(report, "unreadable")
    assert (finding.level, finding.names) == ("amber", ["03.png"])
    assert "truncated file" in finding.details["03.png"]
    assert (report.num_trained, report.num_examples) == (9, 10)


def test_more_than_a_tenth_damaged_blocks(folder: Path) -> None:
    cut(folder / "03.png")
    (folder / "04.png").write_bytes(b"<!DOCTYPE html>")  # refused when the data set is listed
    (folder / "05.png").write_bytes(b"")
    report = check(folder)
    finding = found(report, "unreadable")
    assert finding.level == "red"
    assert sorted(finding.names) == ["03.png", "04.png", "05.png"]
    assert "web page" in finding.details["04.png"]


def test_pictures_left_out_on_purpose_are_not_damaged(folder: Path) -> None:
    for name in ("03.png", "04.png", "05.png"):
        cut(folder / name)
    report = check(folder, exclude=["03.png", "04.png", "05.png"])
    assert report.findings == []
    assert report.num_examples == 7


def test_truncated_jpeg_is_found_although_it_is_decoded_at_reduced_size(folder: Path) -> None:
    large = folder / "00.jpg"
    Image.effect_noise((2000, 1600), 60).convert("RGB").save(large)
    large.write_bytes(large.read_bytes()[: -large.stat().st_size // 10])
    (folder / "00.txt").write_text("noise")
    assert "00.jpg" in found(check(folder), "unreadable").names


def test_nothing_readable_blocks(folder: Path) -> None:
    for path in folder.glob("*.png"):
        cut(path)
    assert found(check(folder), "no-pictures").level == "red"


def test_equal_files_are_found_and_not_said_twice(folder: Path) -> None:
    shutil.copy(folder / "02.png", folder / "07.png")
    report = check(folder)
    finding = found(report, "exact-duplicates")
    assert finding.details == {"07.png": "the same file as 02.png"}
    assert [f.code for f in report.findings] == ["exact-duplicates"]


def test_recompressed_and_resized_copies_are_found(folder: Path) -> None:
    with Image.open(folder / "02.png") as image:
        image.save(folder / "20.jpg", quality=80)
        image.resize((116, 116)).save(folder / "21.png")
    (folder / "20.txt").write_text("one more")
    (folder / "21.txt").write_text("another one")
    finding = found(check(folder), "near-duplicates")
    assert finding.level == "amber"
    assert finding.details == {"20.jpg": "nearly the same as 02.png", "21.png": "nearly the same as 02.png"}


def test_picture_below_its_shape_is_found_from_a_quarter_on(folder: Path) -> None:
    spoil(folder / "01.png", lambda image: image.resize((96, 96)))
    spoil(folder / "02.png", lambda image: image.resize((120, 120)))
    assert found(check(folder), "too-small").details == {"01.png": "96x96, enlarged to 128x128"}


def test_much_cropped_picture_is_found(folder: Path) -> None:
    spoil(folder / "01.png", lambda image: image.resize((500, 130)))
    finding = found(check(folder), "cropped")
    assert list(finding.names) == ["01.png"]
    assert "% is cut off" in finding.details["01.png"]


@pytest.mark.parametrize("radius", [4, 10])
def test_blurred_picture_is_found(folder: Path, radius: int) -> None:
    spoil(folder / "01.png", lambda image: image.resize((512, 512)).filter(ImageFilter.GaussianBlur(radius)))
    assert list(found(check(folder), "blurred").names) == ["01.png"]


def test_sharp_subject_on_a_blurred_background_is_sharp(folder: Path) -> None:
    def portrait(image: Image.Image) -> Image.Image:
        large = image.resize((512, 512), Image.Resampling.NEAREST)
        blurred = large.filter(ImageFilter.GaussianBlur(8))
        blurred.paste(large.crop((150, 150, 360, 360)), (150, 150))
        return blurred

    spoil(folder / "01.png", portrait)
    assert check(folder).findings == []


def test_dark_and_even_pictures_are_found_and_not_called_blurred(folder: Path) -> None:
    spoil(folder / "01.png", lambda image: image.point(lambda value: value // 8))
    spoil(folder / "02.png", lambda image: Image.new("RGB", image.size, (250, 250, 250)))
    report = check(folder)
    assert list(found(report, "dark").names) == ["01.png"]
    assert list(found(report, "flat").names) == ["02.png"]
    assert len(report.findings) == 2


def test_letterbox_and_frame_are_found(folder: Path) -> None:
    spoil(folder / "01.png", lambda image: ImageOps.expand(image, (0, 20, 0, 20), "black"))
    spoil(folder / "02.png", lambda image: ImageOps.expand(image, 8, (240, 240, 230)))
    finding = found(check(folder), "bars")
    assert finding.details["01.png"].endswith("top and bottom")
    assert finding.details["02.png"].endswith("all around")
    assert len(finding.names) == 2


def test_subject_on_white_paper_has_no_bars(folder: Path) -> None:
    def on_paper(image: Image.Image) -> Image.Image:
        paper = Image.new("RGB", (128, 128), "white")
        pen = ImageDraw.Draw(paper)
        pen.ellipse((30, 20, 100, 110), "navy")
        pen.rectangle((50, 50, 60, 90), "orange")
        return paper

    spoil(folder / "01.png", on_paper)
    assert check(folder).findings == []


def test_mark_at_one_place_of_all_pictures_is_found(folder: Path) -> None:
    def signed(image: Image.Image) -> Image.Image:
        ImageDraw.Draw(image).text((126, 126), "(c) me.com", "white", anchor="rs", stroke_width=1, stroke_fill="black")
        return image

    for path in folder.glob("*.png"):
        spoil(path, signed)
    finding = found(check(folder), "common-mark")
    assert "bottom right corner" in finding.text
    assert len(finding.names) >= 5
