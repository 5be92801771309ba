"""The text chunk `parameters` of a PNG, in which the WebUI keeps how a picture was made.

    a cat, ink wash <lora:ink:0.7>
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.0, Seed: 42, Size: 512x512, Model: v1-5-pruned, Version: lora-scripts 0.1.0

Dropping such a PNG on the WebUI's "PNG Info" tab brings all of it back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts import __version__
from lora_scripts.atomic import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Infotext", "format_infotext", "parse_infotext", "read_infotext", "save_png"]

_CHUNK = "parameters"
_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'\s*(?P<key>\w[\w \-/]+):\s*(?P<value>"(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_ENOUGH_PAIRS = 3


@dataclass(frozen=True)
class Infotext:
    """How a picture was made.

    Attributes:
        prompt: as written, LoRA tags included.
        settings: the last line's pairs in their order, `Steps`, `Sampler`, `CFG scale`, `Seed`, `Size`, ...
    """

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def format_infotext(
    prompt: str,
    negative_prompt: str = "",
    *,
    steps: int,
    sampler: str,
    guidance: float,
    seed: int,
    width: int,
    height: int,
    model: str = "",
    model_hash: str = "",
    clip_skip: int = 1,
    lora_hashes: Mapping[str, str] | None = None,
    extra: Mapping[str, object] | None = None,
) -> str:
    """The text for the chunk, in the WebUI's order and spelling.

    Args:
        lora_hashes: LoRA name to SHA-256 of its tensor part; the WebUI shows and compares the first 12 digits.
        extra: further pairs for the last line.
    Source: AUTOMATIC1111/stable-diffusion-webui, `modules/processing.py`, `create_infotext`.
    """
    settings: dict[str, object] = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": guidance,
        "Seed": seed,
        "Size": f"{width}x{height}",
    }
    if model_hash:
        settings["Model hash"] = model_hash
    if model:
        settings["Model"] = model
    if clip_skip > 1:
        settings["Clip skip"] = clip_skip
    if lora_hashes:
        settings["Lora hashes"] = ", ".join(f"{name}: {digest[:12]}" for name, digest in lora_hashes.items())
    settings.update(extra or {})
    settings["Version"] = f"lora-scripts {__version__}"
    last = ", ".join(f"{key}: {_quote(value)}" for key, value in settings.items())
    lines = [prompt, f"{_NEGATIVE} {negative_prompt}" if negative_prompt else "", last]
    return "\n".join(line for index, line in enumerate(lines) if line or index == 0)


def parse_infotext(text: str) -> Infotext:
    """The parts of such a text; a last line with fewer than three pairs is taken as prompt.

    Source: AUTOMATIC1111/stable-diffusion-webui, `modules/infotext_utils.py`.
    """
    lines = text.strip("\n").split("\n")
    pairs = _PAIR.findall(lines[-1])
    settings: dict[str, str] = {}
    if len(pairs) >= _ENOUGH_PAIRS:
        lines.pop()
        settings = {key: _unquote(value) for key, value in pairs}
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        if line.startswith(_NEGATIVE):
            target = negative
            target.append(line[len(_NEGATIVE) :].strip())
        else:
            target.append(line)
    return Infotext("\n".join(prompt), "\n".join(negative), settings)


def save_png(image: Image, path: str | Path, infotext: str = "") -> None:
    """Writes a PNG whole or not at all, with the text inside; any script and emoji survive.

    Raises:
        DataError: the place cannot be written.
    """
    write_atomically(Path(path), png_bytes(image, infotext))


def png_bytes(image: Image, infotext: str = "") -> bytes:
    """The PNG file; text beyond Latin-1 goes into an iTXt chunk, which is UTF-8."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if infotext:
        text = infotext.encode("utf-8", "replace").decode("utf-8").replace("\0", "")
        if text.isascii():
            info.add_text(_CHUNK, text)
        else:
            info.add_itxt(_CHUNK, text)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_infotext(path: str | Path) -> Infotext | None:
    """How a PNG was made, or None where it does not say."""
    from PIL import Image

    with Image.open(path) as image:
        text = image.info.get(_CHUNK)
    return parse_infotext(str(text)) if text else None


def _quote(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',\n:"') else text


def _unquote(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text
