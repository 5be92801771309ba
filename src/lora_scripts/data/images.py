"""The one loader of pictures, for captioning and training: what a captioner sees is what a training run sees.

Pictures come from cameras, phones, drawing programs and the web, and some come to do harm. Only formats of an allow-list
are decoded, the size is checked before decoding, and every refusal says what is wrong with which file.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_scripts.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_ASPECT",
    "MAX_PIXELS",
    "MIN_SIDE",
    "has_alpha",
    "image_digest",
    "image_size",
    "list_images",
    "read_alpha",
    "read_image",
]

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a few kilobytes of PNG can ask for gigabytes of memory."""
MAX_ASPECT = 8.0
"""Longer over shorter side; beyond it cropping or squeezing to a training shape leaves nothing of the picture."""
MIN_SIDE = 8
"""Pixels; the latents of Stable Diffusion have one value per 8 pixels."""

WHITE, BLACK = (255, 255, 255), (0, 0, 0)

_READABLE = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
}
_REFUSED = {".svg", ".svgz", ".jxl", ".jp2", ".tga", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
"""Pictures all the same, so they are listed: `read_image` then tells why they are left out."""
_JUNK_FOLDERS = {"__macosx", "@eadir", "$recycle.bin"}

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_HEAD_BYTES = 1024
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"mif1", b"msf1"}
_KINDS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "it is a git-lfs pointer in place of the picture: run `git lfs pull` in its repository",
    ),
    (b"8BPS", "it is a Photoshop document: export it as PNG"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL is not read: save it as PNG or JPEG"),
    (b"\xff\x0a", "JPEG XL is not read: save it as PNG or JPEG"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000 is not read: save it as PNG or JPEG"),
    (b"%PDF-", "it is a PDF document: save the picture in it as PNG"),
    (b"\x1a\x45\xdf\xa3", "it is a video: save single frames as PNG"),
    (b"PK\x03\x04", "it is a packed archive: unpack it"),
    (b"\x1f\x8b", "it is a packed file: unpack it"),
)


def read_image(path: Path, *, at_least: int | None = None, behind: tuple[int, int, int] = WHITE) -> Image:
    """The picture as people see it, in 8-bit RGB.

    Turned as its EXIF data says, transparency on white (or what is to stand `behind` it), 16 bits scaled to 8, CMYK and wide-gamut colours converted to sRGB
    by their own profile, the first frame of an animation.

    Args:
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster, as long as both sides
            keep this many pixels. For captioners, which see a few hundred pixels.
    Raises:
        DataError: the file is missing, damaged, of a format that is not read, too large, too small or too elongated.
    """
    with _opened(Path(path)) as image:
        if at_least is not None and image.format in ("JPEG", "MPO"):
            shrink = min(image.size) // at_least
            if shrink >= 2:
                image.draft(None, (image.width // shrink, image.height // shrink))
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image, behind)
        method = _transposition(orientation)
        return rgb if method is None else rgb.transpose(method)


def has_alpha(path: Path) -> bool:
    """Whether parts of the picture can be transparent, by the file's header.

    Raises:
        DataError: as `image_size`.
    """
    with _opened(Path(path)) as image:
        return _has_alpha(image)


def read_alpha(path: Path) -> Image | None:
    """How opaque the picture is everywhere, 8-bit grey, turned as its EXIF data says; None where it has no transparency.

    Raises:
        DataError: as `read_image`.
    """
    with _opened(Path(path)) as image:
        image.load()
        if not _has_alpha(image):
            return None
        method = _transposition(_orientation(image))
        alpha = (image.convert("LA") if image.mode == "La" else image).convert("RGBA").getchannel("A")
        return alpha if method is None else alpha.transpose(method)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels after the EXIF turn, read from the file's header.

    Raises:
        DataError: as `read_image`, but for damage that only shows on decoding.
    """
    with _opened(Path(path)) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow turns these itself, and tells the size after the turn
            return width, height
        return (height, width) if _orientation(image) in _TURNED else (width, height)


def image_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(_system_reason(Path(path), error)) from None


def list_images(folder: Path) -> list[Path]:
    """All pictures in a folder and its subfolders, in the order in which people count: img2 before img10.

    Hidden files and folders are skipped, and so is what is no picture by its name. Folders behind symbolic links are
    followed, each folder once. Kinds of picture that cannot be read (SVG, camera raw) are listed, so that the reader can
    say why they are left out.

    Raises:
        DataError: the folder is not there or cannot be opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}. Give the folder that holds the pictures.")
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise DataError(_system_reason(folder, error)) from None
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        try:
            status = os.stat(place)
        except OSError:
            folders.clear()
            continue
        # Links can lead back to a folder above: each folder is entered once, whatever its name. Windows may give no
        # inode numbers; it has no such links in ordinary folders either.
        identity = (status.st_dev, status.st_ino)
        if status.st_ino and identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = [name for name in folders if not name.startswith(".") and name.lower() not in _JUNK_FOLDERS]
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and (suffix in _READABLE or suffix in _REFUSED):
                found.append(Path(place, name))
    return sorted(found, key=lambda path: _natural(path.relative_to(folder)))


def _natural(path: Path) -> tuple[tuple[tuple[tuple[int, int, str], ...], ...], str]:
    """Numbers compared as numbers, letters without regard to case; the exact name decides between equals."""
    parts = tuple(
        tuple(
            (0, int(piece), "") if piece.isascii() and piece.isdigit() else (1, 0, piece)
            for piece in re.split(r"([0-9]+)", part.casefold())
            if piece
        )
        for part in path.parts
    )
    return parts, path.as_posix()


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The allow-list: what this Pillow can read of the formats we mean to read."""
    from PIL import Image, features

    # Pillow only warns about pictures between its two limits; as an error it can be caught and told as a refusal.
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    # Its other remarks (odd EXIF, odd TIFF tags) would stand between the lines of a progress bar and help nobody.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    formats = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
    if features.check("avif"):
        formats.append("AVIF")
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
        formats.append("HEIF")
    Image.init()
    return tuple(formats)


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """The picture with its header read and its size checked; whatever goes wrong inside becomes a DataError."""
    formats = _formats()
    from PIL import Image, UnidentifiedImageError

    try:
        with path.open("rb") as file:
            try:
                with Image.open(file, formats=formats) as image:
                    _check_shape(path, *image.size)
                    yield image
            except DataError:
                raise
            except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
                pixels = re.search(r"\((\d+) pixels\)", str(error))
                amount = f"{int(pixels[1]) / 1e6:.0f} megapixels" if pixels else "far too many pixels"
                raise DataError(_too_large(path, amount)) from None
            except UnidentifiedImageError:
                raise DataError(f"{path}: {_unidentified(path, file)}.") from None
            except MemoryError:
                raise DataError(f"{path}: not enough memory to decode it. Scale it down.") from None
            # The decoders of a dozen formats report damage with as many kinds of exception (OSError, SyntaxError,
            # ValueError, struct.error, ...): at this border any of them means that the file is bad.
            except Exception as error:
                raise DataError(f"{path}: cannot be decoded ({_damage(error)}). {_way_on(path)}") from error
    except OSError as error:
        raise DataError(_system_reason(path, error)) from None


def _way_on(path: Path) -> str:
    return f"Replace it, or leave it out with exclude: {path.name}."


def _system_reason(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file. Was it moved or renamed?"
    if isinstance(error, IsADirectoryError):
        return f"{path}: is a folder, not a picture."
    return f"{path}: cannot be read ({error.strerror or type(error).__name__}). Check its permissions."


def _too_large(path: Path, amount: str) -> str:
    return (
        f"{path}: {amount}, more than the {MAX_PIXELS // 1_000_000} megapixels that are read. "
        "Scale it down; training uses about one megapixel."
    )


def _check_shape(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(_too_large(path, f"{width}x{height} is {width * height / 1e6:.0f} megapixels"))
    if min(width, height) < MIN_SIDE:
        raise DataError(f"{path}: {width}x{height} is too small, both sides need {MIN_SIDE} pixels. {_way_on(path)}")
    aspect = max(width, height) / min(width, height)
    if aspect > MAX_ASPECT:
        raise DataError(
            f"{path}: {width}x{height} is too elongated ({aspect:.0f}:1, at most {MAX_ASPECT:.0f}:1). Crop the part that matters."
        )


def _damage(error: BaseException) -> str:
    text = f"{error}".lower()
    cut = (
        "truncated",
        "cannot read",
        "unexpected end",
        "not enough",
        "premature",
        "eof",
        "broken data stream",
        "no more",
    )
    if isinstance(error, (EOFError, struct.error)) or any(word in text for word in cut):
        return "truncated file"
    return "damaged file"


def _unidentified(path: Path, file: BinaryIO) -> str:
    """What a file is that none of the allowed decoders knows, and what to do about it."""
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if not head:
        return f"the file is empty (0 bytes). {_way_on(path)[:-1]}"
    if not any(head):
        return f"the file begins with zeros, its content never arrived. {_way_on(path)[:-1]}"
    if head[4:8] == b"ftyp":
        brands = {head[8:12]} | {head[i : i + 4] for i in range(16, min(len(head), int.from_bytes(head[:4], "big")), 4)}
        if b"avif" in brands or b"avis" in brands:
            return "AVIF is not read by this Pillow: pip install -U pillow, or save it as PNG or JPEG"
        if brands & _HEIF_BRANDS:
            return 'HEIC needs one more package: pip install "lora-scripts[heif]", or save it as JPEG'
        return "it is a video or a camera raw file: save it as PNG or JPEG"
    for start, reason in _KINDS:
        if head.startswith(start):
            return reason
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text):
        return "SVG is a drawing of lines without pixels: export it as PNG at the size you want"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "it is a web page, not a picture: open the link in a browser and save the picture itself"
    if path.suffix.lower() in _REFUSED:
        return f"{path.suffix.lower()[1:].upper()} files are not read: save it as PNG or JPEG"
    if head.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*", b"MM\x00*")):
        return f"cannot be decoded (truncated file). {_way_on(path)[:-1]}"
    return (
        f"this is not a picture in a format that is read (jpg, png, webp, bmp, gif, tiff, avif). {_way_on(path)[:-1]}"
    )


def _orientation(image: Image) -> int:
    """1 to 8, from EXIF or XMP; 1 when it is absent or unreadable, as every viewer treats it."""
    from PIL import PngImagePlugin

    if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info and not _late_png_text(image):
        # Asking a PNG for EXIF decodes all of it, in case the chunk stands behind the pixels.
        from PIL.Image import Image as Plain

        read: Any = lambda: Plain.getexif(image)  # noqa: E731
    else:
        read = image.getexif
    try:
        value = int(read().get(_ORIENTATION, 1))
    except Exception:
        return 1
    return value if 1 <= value <= 8 else 1


def _late_png_text(image: Image) -> bool:
    """Whether a PNG has chunks behind its pixels that can hold an orientation."""
    file: Any = getattr(image, "fp", None)
    if file is None:
        return False
    before = file.tell()
    try:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IDAT":
                pixels = True
            elif kind == b"IEND":
                return False
            elif pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(length + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(before)


def _transposition(orientation: int) -> Any:
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)


def _has_alpha(image: Image) -> bool:
    if image.mode.startswith("I") or image.mode == "F":
        return False
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _to_rgb(image: Image, behind: tuple[int, int, int]) -> Image:
    """8-bit RGB of a decoded picture of any mode."""
    from PIL import Image as PILImage

    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_to_8_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if _has_alpha(image):
        rgba = image.convert("RGBA")
        colours = _to_srgb(rgba.convert("RGB"), image.info.get("icc_profile"))
        whole = PILImage.new("RGB", rgba.size, behind)
        whole.paste(colours, mask=rgba.getchannel("A"))
        return whole
    return _to_srgb(image, image.info.get("icc_profile"))


def _scaled_to_8_bits(image: Image) -> Image:
    """RGB of a 16-bit, 32-bit or floating-point grey picture; Pillow's own conversion clips all above 255 to white."""
    import numpy as np
    from PIL import Image as PILImage

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("damaged: numbers that are not finite")
    largest = float(values.max())
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:  # the mode does not tell the range that was meant, so the values do
        white = next((bound for bound in (1.0, 255.0, 65535.0) if largest <= bound), largest)
        if image.mode == "I" and white == 1.0:
            white = 255.0
    key = image.info.get("transparency")
    grey = np.clip(values * (255.0 / white) + 0.5, 0, 255).astype(np.uint8)
    if isinstance(key, int):
        grey[values == key] = 255
    return PILImage.fromarray(grey).convert("RGB")


def _to_srgb(image: Image, profile: bytes | None) -> Image:
    """RGB in sRGB, through the embedded colour profile where that is one worth following."""
    plain = image if image.mode == "RGB" else None
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            from PIL import ImageCms

            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                converted = ImageCms.profileToProfile(
                    image,
                    source,
                    _srgb_profile(),
                    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                    outputMode="RGB",
                    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                )
                if converted is not None:
                    return converted
        # A damaged profile, or one for other channels, is no reason to lose the picture.
        except Exception:
            return plain or image.convert("RGB")
    return plain or image.convert("RGB")


@lru_cache(maxsize=1)
def _srgb_profile() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")
