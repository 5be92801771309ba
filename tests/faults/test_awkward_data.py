"""Names, captions and pictures as they come from real folders, through labelling and training."""

from __future__ import annotations

import csv
import os
import struct
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import commands
from helpers.tiny_captioners import write_blip
from lora_scripts.config import RunConfig
from lora_scripts.data.dataset import open_dataset

Settings = Callable[..., dict[str, Any]]

NAMES = [
    "猫咪 白.png",
    "猫咪 黑.png",
    "🐈 cat.png",
    "two  blanks.png",
    "50%.png",
    "100%25.png",
    "it's.png",
    "a,b.png",
    "CON.png",
    "=1+1.png",
    "[x] {y}.png",
    "$(echo no).png",
    unicodedata.normalize("NFC", "é.png"),
    unicodedata.normalize("NFD", "é.png"),
    "很" * 80 + ".png",
    "a.jpg",
    "a.png",
    "A2.png",
    "猫/猫.png",
]
"""Chinese pairs, an emoji, blanks, signs that mean something to shells, spreadsheets and Windows, twins in NFC and NFD."""
if os.name != "nt":
    NAMES.append('a "quoted" one.png')


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blip(tmp_path_factory.mktemp("captioner") / "blip")


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))
    image.save(path)
    return image


def rows(table: Path) -> dict[str, str]:
    with table.open(encoding="utf-8", newline="") as file:
        return {row["filename"]: row["prompt"] for row in csv.DictReader(file)}


def captions(folder: Path) -> Mapping[str, str]:
    """What would be trained with what, by name."""
    config = RunConfig.model_validate({"train_data_dir": folder, "base_model": "x", "output_dir": folder / "run"})
    return {example.name: example.caption for example in open_dataset(config, (64, 64)).examples}


@pytest.mark.fault(18)
def test_awkward_names_are_labelled_and_trained_each_as_itself(
    settings: Settings, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "画 it's 100% [ok] 🎨"
    for number, name in enumerate(NAMES):
        draw(folder / name, number)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()}
    assert len(present) == len(NAMES) or os.name == "nt" or os.uname().sysname == "Darwin"

    code, out, err = commands.label(folder, blip, capsys)
    assert code == 0, out + err
    written = rows(folder / "metadata.csv")
    assert written.keys() == present

    # Each caption is its own, so that a mix-up shows.
    wanted = {name: f"caption {number}" for number, name in enumerate(sorted(present))}
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("filename", "prompt"), *wanted.items()])
    assert captions(folder) == wanted
    run = tmp_path / "out put 🐈 50%"
    code, out, err = commands.train(
        settings(train_data_dir=str(folder), output_dir=str(run), max_steps=1), tmp_path, capsys
    )
    assert code == 0, err
    assert f"{len(present)} of {len(present)} pictures train." in out
    assert (run / "out put 🐈 50%.safetensors").is_file()


@pytest.mark.fault(18)
@pytest.mark.skipif(os.name == "nt", reason="Windows names are always Unicode")
def test_name_that_is_no_unicode_is_left_out_by_name_in_every_log(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        os.rename(os.fsencode(pictures / "03.png"), os.fsencode(pictures) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system wants Unicode names")
    code, out, err = commands.train(settings(max_steps=1), tmp_path, capsys)
    assert code == 0, err
    line = r"caf\udce9.png: its name is not valid Unicode: rename the file"
    assert line in out
    assert line in (tmp_path / "run" / "train.log").read_text("utf-8")
    assert "its name is not valid Unicode" in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "metadata.csv: no use for '03.png' (line 5: no such picture in the folder)." in out


@pytest.mark.fault(18)
def test_name_of_90_chinese_characters_in_a_table_is_reported_and_in_output_dir_refused(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "很" * 90
    with (pictures / "metadata.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow([f"{long}.png", "a cat"])
    code, out, err = commands.train(settings(max_steps=1), tmp_path, capsys)
    assert code == 0, err
    assert f"no use for '{long}.png'" in out
    code, _, err = commands.train(settings(output_dir=str(tmp_path / long)), tmp_path, capsys)
    assert code == 2
    assert "is too long for a file name" in err


CAPTIONS = (
    "filename,prompt",
    '00.png,"一只猫，坐着, quoted"',
    "01.png,一只狗, running, in the park",
    "02.png,a red\0 bird",
    "03.png,",
    '04.png,"' + " ".join(f"word{number}" for number in range(10_000)) + '"',
    "05.png,=SUM(A1)",
)
"""Rows for eight pictures; 06.png and 07.png have none."""


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("encoding", "said"), [("gb18030", "is GBK text"), ("utf-16", "is UTF-16 text"), ("utf-8-sig", "")]
)
def test_awkward_captions_are_decoded_or_reported_and_what_is_cut_is_shown(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str, said: str
) -> None:
    (pictures / "metadata.csv").write_bytes("\r\n".join(CAPTIONS).encode(encoding))
    assert captions(pictures) == {
        "00.png": "一只猫，坐着, quoted",
        "01.png": "一只狗, running, in the park",
        "02.png": "a red bird",
        "04.png": CAPTIONS[5][8:-1],
        "05.png": "=SUM(A1)",
    }
    code, out, err = commands.train(settings(max_steps=1), tmp_path, capsys)
    assert code == 0, err
    assert said in out
    assert "the captions of 1 row hold commas without quotes (first in line 3)" in out
    assert "1 NUL and other control characters were removed (first in line 4)" in out
    assert "5 of 8 pictures train." in out
    assert "left out: 03.png: an empty caption in metadata.csv, and no .txt or .caption file beside it" in out
    assert "left out: 06.png: no row in metadata.csv, and no .txt or .caption file beside it" in out
    (cut,) = [line for line in out.splitlines() if "longer than the text encoder reads" in line]
    assert "04.png (not read: '28 word29 word30" in cut
    assert len(cut) < 220


@pytest.mark.fault(19)
def test_table_in_no_known_encoding_stops_the_run_with_its_line(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "metadata.csv").write_bytes(b"filename,prompt\n00.png,\x81\x8d\xff\x90 x\n")
    code, _, err = commands.train(settings(), tmp_path, capsys)
    assert code == 2
    assert "metadata.csv line 2: the text is neither UTF-8, UTF-16 nor GBK. Save the table as UTF-8" in err


@pytest.mark.fault(19)
def test_labelling_keeps_a_persons_awkward_captions(
    pictures: Path, blip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "metadata.csv").write_bytes("\r\n".join(CAPTIONS).encode("gb18030"))
    code, out, _ = commands.label(pictures, blip, capsys)
    assert code == 0
    found = rows(pictures / "metadata.csv")
    assert found["01.png"] == "一只狗, running, in the park"
    assert found["04.png"] == CAPTIONS[5][8:-1]
    assert all(found[f"0{number}.png"] for number in range(8))
    assert "3 captions written" in out


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def unusual_pictures(folder: Path) -> set[str]:
    """Pictures that are rare and right, as 40 x 48; their names."""
    image = draw(folder / "plain.png", 1)
    grey = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
    Image.fromarray(grey).save(folder / "16 bit.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    palette = image.quantize(16)
    palette.save(folder / "palette with alpha.png", transparency=bytes(range(0, 256, 16)))
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    return {path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".gif")}


def refused_pictures(folder: Path) -> dict[str, str]:
    """Pictures that cannot be trained on, with their reasons by name."""
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (30_000, 20)).save(folder / "ribbon.png")
    (folder / "phone.heic").write_bytes(
        struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(400)
    )
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>', "utf-8")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    return {
        "dot.png": "1x1 is too small, both sides need 8 pixels",
        "ribbon.png": "30000x20 is too elongated (1500:1, at most 8:1)",
        "phone.heic": "HEIC needs one more package" if not has_heif() else "cannot be decoded",
        "drawing.svg": "SVG is a drawing of lines without pixels",
        "bomb.png": "400 megapixels, more than the 64 megapixels that are read",
    }


def has_heif() -> bool:
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.fault(20)
def test_unusual_pictures_are_labelled_and_trained_and_the_others_refused_with_their_reason(
    settings: Settings, blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "unusual"
    folder.mkdir()
    good = unusual_pictures(folder)
    assert len(good) == 6
    bad = refused_pictures(folder)

    code, out, _ = commands.label(folder, blip, capsys)
    assert code == 3  # some are without a caption
    assert rows(folder / "metadata.csv").keys() == good
    for name, reason in bad.items():
        assert f"  {name}: {reason}" in out

    # Without the table, so that the reason is the picture's own and not that it has no row.
    (folder / "metadata.csv").unlink()
    values = settings(train_data_dir=str(folder), max_steps=1)
    code, _, err = commands.train(values, tmp_path, capsys)
    assert code == 2
    assert "5 of 11 pictures cannot be read and would not train." in err
    for name, reason in bad.items():
        assert f"  {name}: {reason}" in err
    # --force, because nearly half of the folder is meant to be unreadable.
    code, out, err = commands.train(values, tmp_path, capsys, options=["--force"])
    assert code == 0, err
    assert "6 of 11 pictures train." in out
    for name, reason in bad.items():
        assert f"left out: {name}: {reason}" in out
    config = RunConfig.model_validate({"train_data_dir": folder, "base_model": "x", "output_dir": folder / "run"})
    sizes = {example.name: example.size for example in open_dataset(config, (64, 64)).examples}
    assert sizes["turned.jpg"] == (40, 48)
    assert sizes["plain.png"] == (48, 40)
