"""Rows of one file: JSON lines, a JSON array, or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lora_scripts.dialogues.text_lines import read_lines
from lora_scripts.errors import DataError

__all__ = ["ROW_SUFFIXES", "SourceRow", "read_rows"]

ROW_SUFFIXES = (".jsonl", ".json", ".txt")
MOST_CHARACTERS = 100_000
"""A text file beyond this is cut at a paragraph: a book is no single example, and a tokenizer takes it in one piece."""

Line = tuple[int, str, str]


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it stands in a file.

    Attributes:
        name: file and line (`train.jsonl:12`), or file and place in an array (`train.json#12`).
        value: what JSON says; None for a fault.
        fault: why it cannot be read; empty where it can.
    """

    name: str
    value: object
    fault: str = ""


def read_rows(path: Path, name: str, notes: list[str]) -> Iterator[SourceRow]:
    """The rows of a file, read line by line; an array is the only thing that is held whole.

    Args:
        name: what rows of this file are called before their line number.
        notes: gets sentences about what was read in an unusual way.
    Raises:
        DataError: the file cannot be opened, is in no known encoding, or is an array that is cut or damaged.
    """
    lines = read_lines(path, notes)
    if path.suffix.lower() == ".txt":
        yield from _text_rows(lines, name)
        return
    first: list[Line] = []
    for line in lines:
        first.append(line)
        if line[1].strip():
            break
    together = chain(first, lines)
    opening = first[-1][1].strip() if first else ""
    if opening.startswith("[") or opening == "{" or (path.suffix.lower() == ".json" and not _is_json(opening)):
        yield from _array_rows(together, path, name)
    else:
        yield from _line_rows(together, name)


def _line_rows(lines: Iterable[Line], name: str) -> Iterator[SourceRow]:
    for number, text, fault in lines:
        if fault:
            yield SourceRow(f"{name}:{number}", None, fault)
        elif text.strip():
            try:
                yield SourceRow(f"{name}:{number}", json.loads(text))
            except json.JSONDecodeError as error:
                reason = f"is no valid JSON ({error.msg} at place {error.colno})"
                yield SourceRow(f"{name}:{number}", None, reason)
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
                yield SourceRow(f"{name}:{number}", None, f"is no valid JSON ({error})")


def _array_rows(lines: Iterable[Line], path: Path, name: str) -> Iterator[SourceRow]:
    """Rows of one array, or of objects that each run over several lines."""
    pieces = []
    for number, text, fault in lines:
        if fault:
            raise DataError(f"{path} line {number}: {fault}. Save the file as UTF-8.")
        pieces.append(text)
    whole = "\n".join(pieces)
    del pieces
    decoder = json.JSONDecoder()
    place = _skip(whole, 0, "[")
    in_array = whole[:place].strip() == "["
    number = 0
    while place < len(whole) and whole[place] != "]":
        number += 1
        try:
            value, place = decoder.raw_decode(whole, place)
        except (ValueError, RecursionError) as error:
            line = whole.count("\n", 0, getattr(error, "pos", place)) + 1
            raise DataError(
                f"{path} line {line}: is no valid JSON ({getattr(error, 'msg', error)}), in row {number}. "
                "Mend it, or write one object per line (JSONL): then only that row is left out."
            ) from None
        yield SourceRow(f"{name}#{number}", value)
        place = _skip(whole, place, ",")
    if in_array and place >= len(whole):
        raise DataError(f"{path}: the array does not end: the file is cut off after row {number}. Copy it again.")


def _skip(text: str, place: int, mark: str) -> int:
    """The place after white space and at most one `mark`."""
    marked = False
    while place < len(text) and (text[place].isspace() or (text[place] == mark and not marked)):
        marked = marked or text[place] == mark
        place += 1
    return place


def _text_rows(lines: Iterable[Line], name: str) -> Iterator[SourceRow]:
    """A file is one text; a long one is cut where a paragraph ends."""
    pieces: list[str] = []
    begins, length = 1, 0
    for number, text, fault in lines:
        if fault:
            yield SourceRow(f"{name}:{number}", None, fault)
            continue
        if not pieces and not text.strip():
            continue
        if not pieces:
            begins = number
        pieces.append(text)
        length += len(text) + 1
        # Without any paragraphs it is cut all the same, at twice the length.
        if length > MOST_CHARACTERS and (not text.strip() or length > 2 * MOST_CHARACTERS):
            yield SourceRow(f"{name}:{begins}", {"text": "\n".join(pieces).strip("\n")})
            pieces, length = [], 0
    if pieces:
        yield SourceRow(f"{name}:{begins}", {"text": "\n".join(pieces).rstrip()})


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
