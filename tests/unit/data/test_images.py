"""The loader of pictures: right pixels, or a refusal with the reason."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from lora_scripts.data.images import image_digest, image_size, list_images, read_image
from lora_scripts.errors import DataError


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """Four coloured quarters with a little noise: any turn, flip or swap of channels shows."""
    noise = np.random.default_rng(seed).integers(0, 20, (height, width, 3))
    values = np.zeros((height, width, 3), np.int64)
    values[: height // 2, : width // 2] = (200, 10, 10)
    values[: height // 2, width // 2 :] = (10, 200, 10)
    values[height // 2 :, : width // 2] = (10, 10, 200)
    values[height // 2 :, width // 2 :] = (220, 220, 30)
    return Image.fromarray((values + noise).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG made by hand of the given chunks."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.gif", "a.jpg", "a.avif"])
def test_every_listed_format_gives_its_pixels(tmp_path: Path, name: str) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    options = {"lossless": True} if name == "a.webp" else {"quality": 95}
    picture().save(tmp_path / name, **options)
    read = read_image(tmp_path / name)
    assert read.mode == "RGB"
    assert image_size(tmp_path / name) == read.size == (48, 32)
    tolerance = 0 if name in ("a.png", "a.bmp", "a.tif", "a.webp") else 40
    assert np.abs(pixels(read)[4:12, 4:20] - pixels(picture())[4:12, 4:20]).max() <= tolerance


@pytest.mark.fault(20)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_row_20_exif_turn_is_applied_to_pixels_and_to_size(tmp_path: Path, kind: str, orientation: int) -> None:
    upright = picture()
    # What a camera stores so that the turn gives `upright`: the inverse of the turn.
    turns = Image.Transpose
    inverse = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {"quality": 100, "subsampling": 0} if kind == "jpg" else {}
    stored.save(tmp_path / f"a.{kind}", exif=exif, **options)
    read = read_image(tmp_path / f"a.{kind}")
    assert read.size == image_size(tmp_path / f"a.{kind}") == (48, 32)
    assert np.abs(pixels(read) - pixels(upright)).mean() < 2


@pytest.mark.fault(20)
def test_orientation_behind_the_pixels_of_a_png_counts_for_the_size_too(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    data = buffer.getvalue()
    (tmp_path / "late.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert image_size(tmp_path / "late.png") == read_image(tmp_path / "late.png").size == (32, 48)


@pytest.mark.fault(20)
def test_row_20_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        read = pixels(read_image(tmp_path / name))
        assert np.array_equal(read[..., 0], np.round(ramp / 257).astype(int))
        assert np.array_equal(read[..., 0], read[..., 2])


@pytest.mark.fault(20)
def test_row_20_16_bit_colour_is_scaled(tmp_path: Path) -> None:
    row = b"\x00" + b"".join(struct.pack(">HHH", 0xFFFF, 0x8000, 0x0100) for _ in range(16))
    (tmp_path / "a.png").write_bytes(png(header(16, 16, depth=16), (b"IDAT", zlib.compress(row * 16)), (b"IEND", b"")))
    assert np.abs(pixels(read_image(tmp_path / "a.png")) - [255, 128, 1]).max() <= 1


@pytest.mark.fault(20)
@pytest.mark.parametrize("scale", [1.0, 255.0, 65535.0])
def test_row_20_floating_point_grey_keeps_its_range(tmp_path: Path, scale: float) -> None:
    ramp = np.linspace(0, scale, 64 * 16, dtype=np.float32).reshape(16, 64)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    read = pixels(read_image(tmp_path / "a.tif"))[..., 0]
    assert np.abs(read - np.linspace(0, 255, 64 * 16).reshape(16, 64)).max() <= 1


@pytest.mark.fault(20)
def test_floating_point_without_finite_numbers_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="damaged file"):
        read_image(tmp_path / "a.tif")


@pytest.mark.fault(20)
def test_row_20_cmyk_is_converted(tmp_path: Path) -> None:
    picture().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(read_image(tmp_path / "a.jpg"))[4:12, 4:20] - pixels(picture())[4:12, 4:20]).max() < 40


def swapped_profile() -> bytes:
    """An sRGB profile whose red and blue primaries are swapped: following it swaps the channels."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * struct.unpack(">I", data[128:132])[0], 12)}
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_colours_follow_the_embedded_profile(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 30))
    red.save(tmp_path / "plain.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert pixels(read_image(tmp_path / "plain.png"))[0, 0].tolist() == [220, 30, 30]
    red.save(tmp_path / "swapped.png", icc_profile=swapped_profile())
    assert pixels(read_image(tmp_path / "swapped.png"))[0, 0] == pytest.approx([30, 30, 220], abs=3)


@pytest.mark.fault(20)
def test_a_damaged_profile_costs_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "a.png", icc_profile=b"no profile at all" * 20)
    assert pixels(read_image(tmp_path / "a.png"))[0, 0].tolist() == [90, 90, 90]


@pytest.mark.fault(20)
def test_row_20_transparency_lies_on_white(tmp_path: Path) -> None:
    see_through = picture().convert("RGBA")
    alpha = np.zeros((32, 48), np.uint8)
    alpha[:16] = 255
    alpha[16:, :24] = 128
    see_through.putalpha(Image.fromarray(alpha))
    see_through.save(tmp_path / "a.png")
    read = pixels(read_image(tmp_path / "a.png"))
    assert np.array_equal(read[:16], pixels(picture())[:16])
    assert (read[16:, 24:] == 255).all()
    half = (pixels(picture())[16:, :24] * 128 + 255 * 127) / 255
    assert np.abs(read[16:, :24] - half).max() <= 1


@pytest.mark.fault(20)
def test_row_20_palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 8, 16))
    image.save(tmp_path / "bytes.png", transparency=b"\x80\xff")
    image.save(tmp_path / "index.gif", transparency=0)
    assert pixels(read_image(tmp_path / "bytes.png"))[0, 0] == pytest.approx([255, 127, 127], abs=1)
    assert pixels(read_image(tmp_path / "bytes.png"))[0, 15].tolist() == [0, 0, 255]
    assert pixels(read_image(tmp_path / "index.gif"))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.fault(20)
@pytest.mark.parametrize("mode", ["L", "LA", "1", "P"])
def test_grey_and_palette_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    picture().convert("L").convert(mode).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").mode == "RGB"


@pytest.mark.fault(20)
@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_row_20_first_frame_of_an_animation(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert pixels(read_image(tmp_path / f"a.{kind}"))[5, 5].tolist() == [255, 0, 0]


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 1), "1x1 is too small, both sides need 8 pixels"),
        ((400, 20), r"400x20 is too elongated \(20:1, at most 8:1\)"),
    ],
)
def test_row_20_too_small_and_too_elongated_are_refused(tmp_path: Path, size: tuple[int, int], reason: str) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=reason):
            read(tmp_path / "a.png")


@pytest.mark.fault(20)
def test_row_20_30000x20_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (30000, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"30000x20 is too elongated \(1500:1"):
        read_image(tmp_path / "a.png")


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("side", "amount"), [(9000, "81 megapixels"), (10000, "100 megapixels"), (20000, "400 megapixels")]
)
def test_row_20_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int, amount: str) -> None:
    # The header promises far more than the few bytes behind it: decoding would end in another error, or in no memory.
    (tmp_path / "bomb.png").write_bytes(png(header(side, side), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")))
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=f"{amount}, more than the 64 megapixels"):
            read(tmp_path / "bomb.png")


@pytest.mark.fault(20)
def test_row_20_heic_names_the_extra_that_reads_it(tmp_path: Path) -> None:
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        (tmp_path / "a.heic").write_bytes(
            struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + b"\0" * 400
        )
        with pytest.raises(DataError, match=r"HEIC needs one more package: pip install \"lora-scripts\[heif\]\""):
            read_image(tmp_path / "a.heic")
    else:
        picture().save(tmp_path / "a.heic", "HEIF")
        assert read_image(tmp_path / "a.heic").size == (48, 32)


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "text", ['<svg xmlns="http://www.w3.org/2000/svg"/>', '<?xml version="1.0"?>\n<!-- made by hand -->\n<svg/>']
)
def test_row_20_svg_is_refused_with_the_reason(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.svg").write_text(text, "utf-8")
    with pytest.raises(DataError, match="SVG is a drawing of lines without pixels: export it as PNG"):
        read_image(tmp_path / "a.svg")


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0" * 500, "begins with zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>log in</body></html>", "it is a web page"),
        (b"hello, this is no picture", "not a picture in a format that is read"),
        (b"8BPS\0\1" + b"\0" * 40, "Photoshop"),
        (b"%PDF-1.7 ......", "PDF document"),
    ],
)
def test_what_is_no_picture_is_called_by_its_name(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(DataError, match=reason):
        read_image(tmp_path / "a.jpg")


@pytest.mark.fault(20)
def test_formats_outside_the_allow_list_are_not_decoded(tmp_path: Path) -> None:
    for kind in ("PPM", "TGA", "PCX", "ICO", "SGI"):
        picture().save(tmp_path / "a.png", kind)
        with pytest.raises(DataError, match="not a picture in a format that is read"):
            read_image(tmp_path / "a.png")


@pytest.mark.fault(7)
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_row_7_truncated_picture_is_named_with_the_reason(tmp_path: Path, kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    path = tmp_path / f"a.{kind}"
    noise.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: max(12, int(len(data) * share))])
    with pytest.raises(
        DataError, match=rf"a\.{kind}: cannot be decoded \((truncated|damaged) file\)\. .*exclude: a\.{kind}"
    ):
        read_image(path)


@pytest.mark.fault(7)
@pytest.mark.fault(20)
def test_flipped_bytes_never_raise_anything_but_a_data_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a"
    outcomes = set()
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        buffer = io.BytesIO()
        picture().save(buffer, kind)
        for _ in range(40):
            data = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(data), 8):
                data[place] = rng.integers(0, 256)
            path.write_bytes(bytes(data))
            try:
                outcomes.add(read_image(path).mode)
            except DataError:
                outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}


@pytest.mark.fault(8)
def test_missing_file_and_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        image_digest(tmp_path / "a.png")


def test_a_large_jpeg_may_be_decoded_smaller_but_never_too_small(tmp_path: Path) -> None:
    picture(1600, 1200).save(tmp_path / "a.jpg", quality=95)
    assert read_image(tmp_path / "a.jpg").size == (1600, 1200)
    small = read_image(tmp_path / "a.jpg", at_least=250)
    assert 250 <= min(small.size) < 600
    assert small.width / small.height == pytest.approx(4 / 3, abs=0.01)
    assert read_image(tmp_path / "a.jpg", at_least=1000).size == (1600, 1200)


def test_pictures_are_listed_in_natural_order_through_subfolders(tmp_path: Path) -> None:
    for name in (
        "img10.png",
        "img2.png",
        "Img3.PNG",
        "sub/b.jpg",
        "sub/a.webp",
        "notes.txt",
        ".hidden.png",
        ".cache/x.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "img.png").touch()
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["img2.png", "Img3.PNG", "img10.png", "sub/a.webp", "sub/b.jpg"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "a.png").touch()
    (tmp_path / "data" / "sub" / "b.png").touch()
    os.symlink(tmp_path / "data", tmp_path / "data" / "sub" / "up")
    os.symlink(tmp_path / "gone", tmp_path / "data" / "broken")
    assert [path.name for path in list_images(tmp_path / "data")] == ["a.png", "b.png"]


def test_folders_behind_a_link_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.png").touch()
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "far", tmp_path / "data" / "one")
    os.symlink(tmp_path / "far", tmp_path / "data" / "two")
    assert len(list_images(tmp_path / "data")) == 1


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_images(tmp_path / "data")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file, not a folder"):
        list_images(tmp_path / "file")


def test_digest_belongs_to_the_content(tmp_path: Path) -> None:
    for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1)):
        picture(seed=seed).save(tmp_path / name)
    a, b, c = (image_digest(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    assert a == b != c
    assert len(a) == 64
