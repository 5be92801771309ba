"""Pictures inside the page: scaled down and written into the `src` attribute."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.report.markup import Html, el

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["open_picture", "picture"]

_QUALITY = 86


def open_picture(path: Path) -> Image | None:
    """The picture in RGB, or None when there is none (a sample folder may have been tidied up since)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def picture(image: Image, max_side: int, description: str) -> Html:
    """An `<img>` that holds the picture itself, its longer side at most `max_side` pixels; a click enlarges it."""
    small = image.convert("RGB")
    small.thumbnail((max_side, max_side))
    return el(
        "img",
        src=_data_uri(small),
        alt=description,
        width=small.width,
        height=small.height,
        loading="lazy",
        data_zoom=True,
    )


def _data_uri(image: Image) -> str:
    from PIL import features

    # WebP takes about two thirds of JPEG's room; some builds of Pillow lack it.
    kind = "WEBP" if features.check("webp") else "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=_QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
