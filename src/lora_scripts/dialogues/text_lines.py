"""Text files line by line, in UTF-8, UTF-16, GBK or Western encoding; a file is never held whole."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lora_scripts.data.caption_files import decode_text
from lora_scripts.errors import DataError

__all__ = ["find_encoding", "is_garbled", "mended", "read_lines"]

_SAMPLE_BYTES = 1_000_000
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_CODECS = {"UTF-8": "utf-8-sig", "UTF-16": "utf-16", "GBK": "gb18030", "Western (Windows-1252)": "cp1252"}

_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(f"[\u00c2-\u00f4][\u0080-\u00bf{_CP1252}]{{1,3}}|锟斤拷|烫烫烫|ï¿½")
"""Candidates for UTF-8 text that was once read as Western, and what GBK readers make of lost characters."""


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, str, str]]:
    """(line number from 1, text without its line end, fault) of every line; a line that is no text has a fault instead.

    Args:
        notes: gets a sentence when the file is not UTF-8.
    Raises:
        DataError: the file cannot be opened or is in no known encoding.
    """
    with _opened(path) as file:
        encoding = find_encoding(file, path)
        if encoding != "UTF-8":
            notes.append(f"{path.name} is {encoding} text and was read as such; save it as UTF-8 to be sure.")
        file.seek(0)
        if encoding.startswith("UTF-16"):
            codec = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else encoding.lower()
            file.seek(0)
            # A line end is two bytes here, so that the file cannot be split before it is decoded.
            with io.TextIOWrapper(file, encoding=codec, errors="replace", newline="\n") as text:
                for number, line in enumerate(text, start=1):
                    yield number, line.rstrip("\r\n"), ""
            return
        codec = _CODECS[encoding]
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.rstrip(b"\r\n").decode(codec if number == 1 else codec.removesuffix("-sig")), ""
            except UnicodeDecodeError as error:
                yield number, "", f"is no {encoding} text (byte 0x{raw[error.start]:02x} at place {error.start + 1})"


def find_encoding(file: BinaryIO, path: Path) -> str:
    """`UTF-8`, `UTF-16`, `UTF-16-LE`, `UTF-16-BE`, `GBK` or `Western (Windows-1252)`.

    A UTF-8 file with a few damaged lines stays UTF-8: only when most lines with foreign letters are none is another encoding
    looked for.

    Raises:
        DataError: it is none of them.
    """
    start = file.read(4000)
    file.seek(0)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    for name, offset in (("UTF-16-LE", 1), ("UTF-16-BE", 0)):
        zeros, others = start[offset::2].count(0), start[1 - offset :: 2].count(0)
        if len(start) >= 8 and zeros > len(start) // 6 and others < zeros // 4:
            return name
    good, bad, sample = 0, 0, bytearray()
    for raw in file:
        if raw.isascii():
            continue
        try:
            raw.decode("utf-8")
            good += 1
        except UnicodeDecodeError:
            bad += 1
            if len(sample) < _SAMPLE_BYTES:
                sample += raw
    return "UTF-8" if bad <= good else decode_text(bytes(sample), path)[1]


def mended(text: str) -> str:
    """The text with each half of a character pair, which no tokenizer takes, as a replacement character."""
    return _LONE_SURROGATE.sub("\ufffd", text) if not text.isascii() else text


def is_garbled(text: str) -> str:
    """What is wrong with the text's characters, as a phrase; empty where nothing is."""
    if "\x00" in text:
        return "NUL characters"
    if text.isascii():
        return ""
    if "\ufffd" in text:
        return "replacement characters (lost letters)"
    for match in _MOJIBAKE.finditer(text):
        piece = match[0]
        if not "\u00c2" <= piece[0] <= "\u00f4" or piece == "ï¿½":
            return f"garbled letters ({piece})"
        for length in (4, 3, 2):  # the longest reading first: a byte of a character may look like a letter
            try:
                _western_bytes(piece[:length]).decode("utf-8")
            except UnicodeError:
                continue
            return f"garbled letters ({piece[:length]})"
    return ""


def _western_bytes(text: str) -> bytes:
    """The bytes that a Western reader took for these letters; it passes those on that its code page has no letter for."""
    return b"".join(letter.encode("cp1252" if letter in _CP1252 else "latin-1") for letter in text)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or type(error).__name__}).") from None
    with file:
        yield file
