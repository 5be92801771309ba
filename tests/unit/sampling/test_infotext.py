"""How a picture was made, in the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_scripts import __version__
from lora_scripts.errors import DataError
from lora_scripts.sampling.infotext import format_infotext, parse_infotext, read_infotext, save_png

SETTINGS = {"steps": 20, "sampler": "DPM++ 2M", "guidance": 7.0, "seed": 42, "width": 512, "height": 768}


def test_text_is_written_as_the_webui_writes_it() -> None:
    text = format_infotext(
        "a fox <lora:ink:0.7>",
        "blurry",
        **SETTINGS,
        model="v1-5-pruned",
        model_hash="cc6cb27103",
        clip_skip=2,
        lora_hashes={"ink": "0123456789abcdef0123", "b": "f" * 64},
    )
    assert text == (
        "a fox <lora:ink:0.7>\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.0, Seed: 42, Size: 512x768, Model hash: cc6cb27103, "
        'Model: v1-5-pruned, Clip skip: 2, Lora hashes: "ink: 0123456789ab, b: ffffffffffff", '
        f"Version: lora-scripts {__version__}"
    )


PROMPTS = {
    "plain": ("a fox", ""),
    "both": ("a fox, (red:1.2) <lora:ink:0.7>", "blurry, dark"),
    "Chinese and emoji": ("水墨画，一只狐狸 🦊", "模糊 😀"),
    "several lines": ("a fox\nin the snow", "blurry\ndark"),
    "empty": ("", ""),
    "quotes, colons and commas": ('he said: "run, fox", Steps: many', 'a "b", c: d'),
}


@pytest.mark.parametrize(("prompt", "negative"), PROMPTS.values(), ids=PROMPTS)
def test_written_picture_tells_what_it_was_made_from(tmp_path: Path, prompt: str, negative: str) -> None:
    path = tmp_path / "a.png"
    extra = {"Note": 'with "quotes", commas: and\nlines'}
    save_png(Image.new("RGB", (8, 8), "red"), path, format_infotext(prompt, negative, **SETTINGS, extra=extra))
    found = read_infotext(path)
    assert found is not None
    assert (found.prompt, found.negative_prompt) == (prompt, negative)
    assert found.settings["Seed"] == "42"
    assert found.settings["Size"] == "512x768"
    assert found.settings["Note"] == extra["Note"]
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_text_beyond_ascii_is_an_itxt_chunk_and_plain_text_is_not(tmp_path: Path) -> None:
    for name, prompt, chunk in (("a", "a fox", b"tEXt"), ("b", "一只狐狸", b"iTXt")):
        save_png(Image.new("RGB", (8, 8)), tmp_path / name, prompt)
        assert chunk + b"parameters\0" in (tmp_path / name).read_bytes()


def test_a_text_of_the_webui_itself_is_read() -> None:
    found = parse_infotext(
        "masterpiece, a fox\nNegative prompt: lowres, bad hands\nSteps: 28, Sampler: DPM++ 2M, Schedule type: Karras, "
        'CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 6ce0161689, Model: v1-5, Lora hashes: "a: 1, b: 2", '
        "Version: v1.10.1"
    )
    assert found.prompt == "masterpiece, a fox"
    assert found.negative_prompt == "lowres, bad hands"
    assert found.settings["Schedule type"] == "Karras"
    assert found.settings["Lora hashes"] == "a: 1, b: 2"
    assert found.settings["Version"] == "v1.10.1"


def test_text_without_settings_is_all_prompt() -> None:
    found = parse_infotext("a fox: red\nand: blue")
    assert (found.prompt, dict(found.settings)) == ("a fox: red\nand: blue", {})


def test_picture_without_a_text_says_nothing(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    assert read_infotext(tmp_path / "a.png") is None


def test_characters_that_cannot_be_written_do_not_stop_the_picture(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", "fox \ud800 \0 end")
    found = read_infotext(tmp_path / "a.png")
    assert found is not None
    assert found.prompt.startswith("fox ")
    assert found.prompt.endswith(" end")


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png: is a folder"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "folder.png")
