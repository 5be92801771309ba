"""Pictures side by side with their labels: prompts down, checkpoints and weights across."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

__all__ = ["Group", "draw_grid", "fit_text"]

_CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "simhei.ttf",
    "simsun.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)
"""Fonts that systems bring along, tried in this order for what Pillow's own font cannot write."""

_PAPER, _INK, _SOFT, _EMPTY, _LINE = "#ffffff", "#1d1d1f", "#6e6e73", "#f0f0f2", "#d9d9de"
_MARGIN, _GAP, _GROUP_GAP = 28, 8, 36
_SMALLEST, _LARGEST = 192, 512
_WIDEST = 12_000


@dataclass(frozen=True)
class Group:
    """Neighbouring columns under one heading: a checkpoint with its weights.

    Attributes:
        columns: heading of each column; a single empty text leaves that line out.
    """

    heading: str
    columns: Sequence[str]


def draw_grid(
    rows: Sequence[str], groups: Sequence[Group], cells: Sequence[Sequence[Image | None]], title: str = ""
) -> Image:
    """One picture with all others in it: `cells[row][column]`, columns counted through all groups.

    Small pictures are enlarged by a whole factor, large ones shrunk, to sides of 192 to 512 pixels; a missing one stays
    an empty field. Labels that are too long are wrapped and end in an ellipsis; characters that no font on this machine
    can write appear as "?".
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    num_columns = sum(len(group.columns) for group in groups)
    assert len(cells) == len(rows), "one line of cells for each row"
    assert all(len(row) == num_columns for row in cells), "one cell for each column"
    width, height = _cell_size(cells, num_columns)
    # A wide sheet is looked at from further away.
    label_size = max(16, min(22, width // 12), min(30, num_columns * width // 140))
    left = 0
    if any(rows):
        left = max(140, min(300, int(width * 0.9))) + 20

    pen = ImageDraw.Draw(Images.new("RGB", (1, 1)))
    titled = fit_text(pen, title, _font(title, label_size + 6), left + num_columns * (width + _GAP), 2) if title else []
    has_groups = any(group.heading for group in groups)
    has_columns = any(column for group in groups for column in group.columns)
    line = int(label_size * 1.35)
    heads = [
        fit_text(pen, group.heading, _font(group.heading, label_size), len(group.columns) * (width + _GAP) - _GAP, 2)
        for group in groups
    ]
    group_lines = max((len(lines) for lines in heads), default=0) if has_groups else 0
    title_height = len(titled) * int(line * 1.3) + (12 if titled else 0)
    top = _MARGIN + title_height + group_lines * line + (line if has_columns else 0) + 8

    total_width = 2 * _MARGIN + left + num_columns * (width + _GAP) - _GAP + (len(groups) - 1) * (_GROUP_GAP - _GAP)
    total_height = top + len(rows) * (height + _GAP) - _GAP + _MARGIN
    sheet = Images.new("RGB", (total_width, total_height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, text in enumerate(titled):
        pen.text((_MARGIN, _MARGIN + index * int(line * 1.3)), text, _INK, _font(text, label_size + 6))

    x, column = _MARGIN + left, 0
    for group, lines in zip(groups, heads, strict=True):
        group_width = len(group.columns) * (width + _GAP) - _GAP
        y = _MARGIN + title_height + (group_lines - len(lines)) * line
        for text in lines:
            pen.text((x + group_width / 2, y), text, _INK, _font(text, label_size), anchor="ma")
            y += line
        for name in group.columns:
            if has_columns:
                small = _font(name, label_size - 2)
                shown = fit_text(pen, name, small, width, 1)
                pen.text((x + width / 2, top - 8 - line + 2), shown[0], _SOFT, small, anchor="ma")
            for row in range(len(rows)):
                _place(sheet, pen, cells[row][column], (x, top + row * (height + _GAP)), (width, height))
            x += width + _GAP
            column += 1
        x += _GROUP_GAP - _GAP
    for row, label in enumerate(rows):
        if label:
            font = _font(label, label_size - 1)
            lines = fit_text(pen, label, font, left - 20, max(1, height // line))
            y = top + row * (height + _GAP) + (height - len(lines) * line) // 2
            for text in lines:
                pen.text((_MARGIN, y), text, _INK, font)
                y += line
    return sheet


def fit_text(pen: ImageDraw, text: str, font: Font, width: float, max_lines: int) -> list[str]:
    """The text in lines of at most `width` pixels; what does not fit into `max_lines` ends in an ellipsis."""
    lines: list[str] = []
    rest = _parts(" ".join(_writable(text, font).split()))
    current = ""
    while rest:
        part = rest.pop(0)
        if pen.textlength((current + part).rstrip(), font) <= width:
            current += part
        elif current.strip():
            lines.append(current.rstrip())
            current = ""
            rest.insert(0, part.lstrip())
        else:
            # One word wider than the line is cut wherever it has to be.
            count = max(1, next((n for n in range(len(part), 0, -1) if pen.textlength(part[:n], font) <= width), 1))
            lines.append(part[:count])
            rest.insert(0, part[count:])
        rest = [part for part in rest if part]
        if len(lines) > max_lines:
            break
    if current.strip():
        lines.append(current.rstrip())
    if len(lines) <= max_lines:
        return lines or [""]
    last = lines[max_lines - 1]
    while last and pen.textlength(f"{last}…", font) > width:
        last = last[:-1].rstrip()
    return [*lines[: max_lines - 1], f"{last}…"]


def _parts(text: str) -> list[str]:
    """Words with the space behind them; Chinese, Japanese and Korean characters one by one."""
    parts: list[str] = []
    word = ""
    for char in text:
        if unicodedata.east_asian_width(char) in "WF":
            parts += [word, char]
            word = ""
        else:
            word += char
            if char in " _-/,":
                parts.append(word)
                word = ""
    return [part for part in [*parts, word] if part]


def _place(sheet: Image, pen: ImageDraw, image: Image | None, at: tuple[int, int], size: tuple[int, int]) -> None:
    from PIL.Image import Resampling

    box = (at[0], at[1], at[0] + size[0] - 1, at[1] + size[1] - 1)
    if image is None:
        pen.rectangle(box, fill=_EMPTY, outline=_LINE)
        return
    scale = min(size[0] / image.width, size[1] / image.height)
    shown = image.convert("RGB")
    if scale != 1.0:
        wanted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        shown = shown.resize(wanted, Resampling.LANCZOS)
    sheet.paste(shown, (at[0] + (size[0] - shown.width) // 2, at[1] + (size[1] - shown.height) // 2))


def _cell_size(cells: Sequence[Sequence[Image | None]], num_columns: int) -> tuple[int, int]:
    """Width and height of a field: the largest picture, brought to a side that can be looked at."""
    images = [image for row in cells for image in row if image is not None]
    width = max((image.width for image in images), default=_SMALLEST)
    height = max((image.height for image in images), default=_SMALLEST)
    longest = max(width, height)
    if longest < _SMALLEST:
        factor: float = -(-_SMALLEST // longest)
    else:
        factor = min(1.0, _LARGEST / longest)
    factor = min(factor, _WIDEST / max(1, num_columns * width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def _font(text: str, size: int) -> Font:
    """Pillow's own font, or the first one of the system that can write more of the text."""
    best = _builtin_font(size)
    missing = sum(not _has(best, char) for char in set(text))
    for name in _CJK_FONTS if missing else ():
        font = _system_font(name, size)
        if font is not None and (count := sum(not _has(font, char) for char in set(text))) < missing:
            best, missing = font, count
        if not missing:
            break
    return best


@lru_cache(maxsize=64)
def _builtin_font(size: int) -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size)


@lru_cache(maxsize=256)
def _system_font(name: str, size: int) -> Font | None:
    from PIL import ImageFont

    try:
        return ImageFont.truetype(name, size)
    except (OSError, ImportError):
        return None


@lru_cache(maxsize=4096)
def _has(font: Font, char: str) -> bool:
    """Whether a font can write a character: it draws something else than for one that no font has."""
    if char.isspace():
        return True
    try:
        return bytes(font.getmask(char)) != bytes(font.getmask("\U0010ffff"))
    except (UnicodeError, OSError):
        return False


def _writable(text: str, font: Font) -> str:
    return "".join(char if _has(font, char) else "?" for char in unicodedata.normalize("NFC", text))
