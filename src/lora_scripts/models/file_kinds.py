"""What a file is, by its first bytes: the things that people have in hand when they think they have weights."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FILE_KINDS", "looks_like"]

_STARTS = (
    (b"version https://git-lfs", "git-lfs pointer"),
    (b"GGUF", "gguf"),
    (b"\x89PNG\r\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"),
    (b"BM", "image"),
    (b"II*\x00", "image"),
    (b"MM\x00*", "image"),
    (b"\x89HDF\r\n", "hdf5"),
    (b"7z\xbc\xaf\x27\x1c", "archive"),
    (b"Rar!\x1a\x07", "archive"),
    (b"\x1f\x8b", "archive"),
    (b"%PDF-", "pdf"),
    (b"(dp", "pickle"),
    (b"(lp", "pickle"),
)

_OLDEST_PICKLE = re.compile(rb"c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n(?:\(|p[0-9])")
"""Protocol 0, which is text: a module, a name in it, and the beginning of its arguments."""

FILE_KINDS: Mapping[str, tuple[str, str]] = {
    "empty": ("the file is empty", "Download it again; the last attempt was broken off or the disk was full."),
    "zeros": (
        "the file begins with zeros: its space was reserved, but the content never arrived",
        "Download it again.",
    ),
    "html": (
        "this is a web page, not weights",
        "A download that needed a login or a click leaves one behind. Open the link in a browser and download the file itself.",
    ),
    "git-lfs pointer": (
        "this is a git-lfs pointer, a few lines of text in place of the weights",
        "Run `git lfs pull` in that repository, or download the file itself.",
    ),
    "pickle": (
        "this is a pickle (.ckpt, .pt or .bin weights), which can run any program when it is opened, so it is never loaded",
        "Use the .safetensors version of the model, or convert it in a place you trust (the WebUI's checkpoint merger writes "
        "safetensors), then give the new file.",
    ),
    "gguf": (
        "this is a GGUF file, quantised for inference, which cannot be trained",
        "Use the original .safetensors file or folder of the model.",
    ),
    "image": ("this is a picture, not weights", "Give the path of the model's .safetensors file."),
    "archive": ("this is a packed archive", "Unpack it, then give the .safetensors file that was inside."),
    "hdf5": ("this is an HDF5 file of another framework", "Use the .safetensors version of the model."),
    "pdf": ("this is a PDF document, not weights", "Give the path of the model's .safetensors file."),
    "json": ("this is a JSON text, not weights", "Give the .safetensors file, or the folder that holds it."),
    "text": ("this is a text file, not weights", "Give the path of the model's .safetensors file."),
    "unknown": (
        "this is not a safetensors file",
        "Use a model in safetensors format. If the name says it is one, the file is damaged: download it again.",
    ),
}
"""What a file is that is no safetensors file, and the way on; two complete texts each."""


def looks_like(path: Path | str) -> str:
    """What a file is, judged by its first bytes and never by its name.

    Returns:
        "safetensors", or one of "empty", "zeros", "html", "git-lfs pointer", "pickle", "gguf", "image", "archive", "hdf5", "pdf",
        "json", "text", "unknown". "safetensors" means the file starts like one, not that it is whole.
    """
    with Path(path).open("rb") as file:
        head = file.read(1024)
    if not head:
        return "empty"
    if not any(head):
        return "zeros"
    # A header length below the cap followed by "{" is safetensors; a larger one is left to `inspect_weights` to refuse.
    if len(head) >= 9 and head[8:9] == b"{" and head[4:8] == b"\0\0\0\0":
        return "safetensors"
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image"
    if _OLDEST_PICKLE.match(head) or (head[0] == 0x80 and len(head) > 1 and head[1] <= 5):
        return "pickle"
    if head.startswith(b"PK\x03\x04"):
        return "pickle" if _zip_holds_pickle(Path(path), head) else "archive"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<script", b"<!--")):
        return "html"
    if text.startswith((b"{", b"[")):
        return "json"
    return "unknown" if any(byte < 9 for byte in head) or len(head) < 16 else _text_or_unknown(head)


def _text_or_unknown(head: bytes) -> str:
    try:
        head[:-4].decode("utf-8")
    except UnicodeDecodeError:
        return "unknown"
    return "text"


def _zip_holds_pickle(path: Path, head: bytes) -> bool:
    """Whether a zip is one that torch wrote; only its list of names is read, nothing is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        # A half download has no list at its end; torch puts the pickle first, so its name is in the first bytes.
        return b".pkl" in head
