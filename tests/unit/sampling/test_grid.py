"""Pictures side by side."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from lora_scripts.sampling import grid
from lora_scripts.sampling.grid import Group, draw_grid, fit_text

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
COLOURS = [(20 * n, 255 - 20 * n, 40) for n in range(1, 13)]


def fields(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The box that a colour fills."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_every_picture_stands_whole_in_its_row_and_column() -> None:
    cells = [[Image.new("RGB", (64, 64), COLOURS[row * 4 + column]) for column in range(4)] for row in range(3)]
    sheet = draw_grid(["a fox", "a house", "a tree"], [Group("step 1", ["0", "1"]), Group("step 2", ["0", "1"])], cells)
    boxes = [[fields(sheet, COLOURS[row * 4 + column]) for column in range(4)] for row in range(3)]
    assert {(box[2] - box[0], box[3] - box[1]) for row in boxes for box in row} == {(192, 192)}
    lefts, tops = [box[0] for box in boxes[0]], [row[0][1] for row in boxes]
    assert all([box[0] for box in row] == lefts for row in boxes)
    assert all([box[1] for box in row] == [top] * 4 for row, top in zip(boxes, tops, strict=True))
    assert lefts == sorted(lefts)
    assert tops == sorted(tops)
    assert lefts[2] - lefts[1] > lefts[1] - lefts[0]  # groups stand apart
    assert boxes[0][0][0] > 140  # labels on the left
    assert boxes[0][0][1] > 40  # headings above


def test_labels_and_headings_are_drawn() -> None:
    cell = [[Image.new("RGB", (200, 200), RED)]]
    plain = draw_grid([""], [Group("", [""])], cell)
    labelled = draw_grid(["a fox"], [Group("step 100", ["0.7"])], cell, "title")
    assert plain.size == (200 + 56, 200 + 64)
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    left_of_picture = labelled.crop((0, fields(labelled, RED)[1], fields(labelled, RED)[0], labelled.height))
    above_picture = labelled.crop((fields(labelled, RED)[0], 0, labelled.width, fields(labelled, RED)[1]))
    for area in (left_of_picture, above_picture):
        assert np.asarray(area.convert("L")).min() < 120


def test_large_pictures_are_shrunk_and_keep_their_shape() -> None:
    cells = [[Image.new("RGB", (1024, 1536), RED), Image.new("RGB", (1024, 512), BLUE)]]
    sheet = draw_grid([""], [Group("", ["", ""])], cells)
    red, blue = fields(sheet, RED), fields(sheet, BLUE)
    assert (red[2] - red[0], red[3] - red[1]) == (341, 512)
    assert (blue[2] - blue[0]) / (blue[3] - blue[1]) == pytest.approx(2.0, rel=0.02)


def test_missing_picture_is_an_empty_field() -> None:
    sheet = draw_grid([""], [Group("", ["", ""])], [[Image.new("RGB", (200, 200), RED), None]])
    box = fields(sheet, (240, 240, 242))
    assert box[0] > fields(sheet, RED)[2]


def test_huge_grids_stay_below_a_width_that_can_be_opened() -> None:
    cells = [[Image.new("RGB", (512, 512), RED)] * 60]
    assert draw_grid([""], [Group("", [""] * 60)], cells).width < 13_000


@pytest.fixture
def pen() -> ImageDraw.ImageDraw:
    return ImageDraw.Draw(Image.new("RGB", (1, 1)))


def test_long_labels_are_wrapped_within_their_width_and_end_in_an_ellipsis(pen: ImageDraw.ImageDraw) -> None:
    font = ImageFont.load_default(16)
    text = "a red fox in the snow at night under a full moon, supercalifragilisticexpialidocious"
    lines = fit_text(pen, text, font, 150, 20)
    assert " ".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(pen.textlength(line, font) <= 150 for line in lines)
    cut = fit_text(pen, text, font, 150, 2)
    assert len(cut) == 2
    assert cut[1].endswith("…")
    assert all(pen.textlength(line, font) <= 150 for line in cut)
    assert cut[0] == lines[0]


def test_short_label_is_one_line_and_an_empty_one_too(pen: ImageDraw.ImageDraw) -> None:
    font = ImageFont.load_default(16)
    assert fit_text(pen, "a  fox\n", font, 300, 2) == ["a fox"]
    assert fit_text(pen, "", font, 300, 2) == [""]


def test_characters_that_no_font_has_become_question_marks(
    pen: ImageDraw.ImageDraw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_CJK_FONTS", ())
    font = grid._font("水墨 fox", 16)
    assert fit_text(pen, "水墨 fox!", font, 300, 1) == ["?? fox!"]
    assert draw_grid(["水墨"], [Group("水墨", ["水"])], [[None]], "水").height > 200


def test_fonts_that_are_not_installed_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_CJK_FONTS", ("no such font at all.ttf",))
    assert grid._font("水", 16) is grid._builtin_font(16)
