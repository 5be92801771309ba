"""Caption tables as people write them: CSV and JSONL in every encoding, with every kind of quoting.

Tables are edited in Excel, in editors of every age and by hand. What can be understood is read, and said once; what cannot
is reported by its line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_scripts.errors import DataError, did_you_mean

__all__ = ["CaptionRow", "Problem", "RawTable", "decode_text", "normalise_caption", "read_table"]

NAME_COLUMNS = ("filename", "file_name", "image")
TEXT_COLUMNS = ("prompt", "caption", "text")
MAX_TABLE_BYTES = 256_000_000
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet computes a cell that begins so."""

_FURTHER = re.compile(f"(?:{'|'.join(TEXT_COLUMNS)})_([2-9]|[1-9][0-9])")
"""Columns with further captions of a picture, `prompt_2` on."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_BLANK = re.compile("[ \t\r\n\u00a0]+")
_PICTURE_ROW = re.compile(
    r"^[^,;\t\n]+\.(?:jpe?g|png|webp|bmp|gif|tiff?|avif|heic)[,;\t]", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True)
class Problem:
    """A picture or row that gives no caption.

    Attributes:
        kind: "no caption", "no picture", "refused name", "ambiguous name", "bad row", "bad name" or "bad sidecar".
        name: the picture's relative name, or the name or line in the table.
    """

    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class CaptionRow:
    """One row of a table as written: nothing matched yet.

    Attributes:
        more: further captions, of the columns `prompt_2` on; those of a CSV are in `extra` too, for they survive a rewrite.
    """

    line: int
    name: str
    text: str
    extra: Mapping[str, str] = field(default_factory=dict)
    more: Sequence[str] = ()


@dataclass
class RawTable:
    """A table's rows in order, and what was noticed while reading.

    Attributes:
        extra_columns: columns beside name and caption, in order; they belong to the user and survive a rewrite.
        plain: UTF-8 with one understood row per line, so that writing it anew changes nothing but the quoting.
        bom: the file begins with the mark that lets Excel show Chinese rightly.
    """

    rows: list[CaptionRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    extra_columns: list[str] = field(default_factory=list)
    plain: bool = True
    bom: bool = False


def normalise_caption(text: str) -> str:
    """The caption on one line, without control characters and without blanks at its ends."""
    return _BLANK.sub(" ", _CONTROL.sub("", text)).strip(" ")


def read_table(path: Path) -> RawTable:
    """The rows of a CSV or JSONL caption table.

    Raises:
        DataError: the file cannot be read, is in no known encoding, or lacks the columns.
    """
    text, table = _read_text(path)
    stripped = text.lstrip()
    if not stripped:
        return table
    if path.suffix.lower() in (".jsonl", ".json") or stripped[0] == "{":
        _parse_json(text, path, table)
    else:
        _parse_csv(text, path, table)
    return table


def _read_text(path: Path) -> tuple[str, RawTable]:
    table = RawTable()
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"{path}: is larger than {MAX_TABLE_BYTES // 1_000_000} MB. Is it a caption table?")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or type(error).__name__}).") from None
    text, encoding = decode_text(data, path)
    table.bom = data.startswith(b"\xef\xbb\xbf")
    if encoding != "UTF-8":
        table.plain = False
        table.notes.append(
            f"{path.name} is {encoding} text and was read as such; new versions of it are written as UTF-8."
        )
    odd = _CONTROL.findall(text)
    if odd:
        line = text.count("\n", 0, _CONTROL.search(text).start()) + 1  # type: ignore[union-attr]
        kinds = "NUL and other control characters" if "\x00" in odd else "control characters"
        table.notes.append(f"{path.name}: {len(odd)} {kinds} were removed (first in line {line}).")
        text = _CONTROL.sub("", text)
    return text, table


def decode_text(data: bytes, path: Path) -> tuple[str, str]:
    """The text and the name of its encoding: UTF-8, UTF-16, GBK or Western.

    Raises:
        DataError: it is none of them.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return data.decode("utf-16"), "UTF-16"
        except UnicodeDecodeError:
            raise DataError(f"{path}: begins like UTF-16 text but is cut off. Save it again as UTF-8.") from None
    sample = data[:4000]
    for encoding, start in (("utf-16-le", 1), ("utf-16-be", 0)):
        # Plain letters in UTF-16 have a zero in every second byte; few Chinese characters have one in the other.
        zeros, others = sample[start::2].count(0), sample[1 - start :: 2].count(0)
        if len(sample) >= 8 and zeros > len(sample) // 6 and others < zeros // 4:
            try:
                return data.decode(encoding), "UTF-16"
            except UnicodeDecodeError:
                break
    try:
        return data.decode("utf-8-sig"), "UTF-8"
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        text = ""
    # In Chinese text the second byte of a character is nearly always above 0xA0; in Western text it is the next letter.
    pairs = re.findall(rb"[\x81-\xfe]([\x40-\xfe])", data)
    if text and 2 * sum(pair[0] > 0xA0 for pair in pairs) >= len(pairs):
        return text, "GBK"
    try:
        return data.decode("cp1252"), "Western (Windows-1252)"
    except UnicodeDecodeError:
        raise DataError(
            f"{path} line {line}: the text is neither UTF-8, UTF-16 nor GBK. Save the table as UTF-8 "
            "(Excel: Save As, CSV UTF-8)."
        ) from None


def _parse_json(text: str, path: Path, table: RawTable) -> None:
    entries: Iterable[tuple[int, object]]
    if text.lstrip().startswith("["):
        try:
            entries = enumerate(json.loads(text), start=1)
        except ValueError as error:
            raise DataError(f"{path}: is no valid JSON ({error}).") from None
    else:
        entries = _json_lines(text, table)
    for line, entry in entries:
        fields = {str(key).lower(): value for key, value in entry.items()} if isinstance(entry, dict) else {}
        name = next((fields[key] for key in NAME_COLUMNS if isinstance(fields.get(key), str)), None)
        captions = next((_texts(fields[key]) for key in TEXT_COLUMNS if isinstance(fields.get(key), str | list)), [])
        further = {key: value for key, value in fields.items() if isinstance(value, str)}
        if name is None:
            table.problems.append(Problem("bad row", f"line {line}", f"has no text under {' or '.join(NAME_COLUMNS)}"))
        else:
            first, *others = captions or [""]
            more = [*filter(None, map(normalise_caption, others)), *_further(further)]
            table.rows.append(CaptionRow(line, name, normalise_caption(first), more=more))


def _texts(value: str | list[object]) -> list[str]:
    """The texts of a JSON value that is one or a list of them."""
    return [value] if isinstance(value, str) else [each for each in value if isinstance(each, str)]


def _further(cells: Mapping[str, str]) -> list[str]:
    """The captions in columns `prompt_2` on, in the order of their numbers."""
    numbers = {column: int(match[1]) for column in cells if (match := _FURTHER.fullmatch(column))}
    captions = (
        normalise_caption(_plain_cell(cells[column].strip())) for column in sorted(numbers, key=numbers.__getitem__)
    )
    return [caption for caption in captions if caption]


def _json_lines(text: str, table: RawTable) -> Iterable[tuple[int, object]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except (ValueError, RecursionError) as error:
                table.problems.append(Problem("bad row", f"line {line}", f"is no valid JSON ({error})"))


def _parse_csv(text: str, path: Path, table: RawTable) -> None:
    if text[:4].lower() == "sep=":  # Excel's own first line, which names the separator
        text = text.partition("\n")[2]
    first = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = next((mark for mark in (";", "\t") if "," not in first and mark in first), ",")
    if delimiter != ",":
        table.plain = False
        kind = "semicolons" if delimiter == ";" else "tabs"
        table.notes.append(f"{path.name} separates its columns by {kind}; new versions of it use commas.")
    records = _csv_records(text, delimiter, path, table)
    if not records:
        return
    columns = [cell.strip().lower() for cell in records[0][1]]
    known = [column for column in columns if column in (*NAME_COLUMNS, *TEXT_COLUMNS)]
    if not known and _PICTURE_ROW.match(f"{records[0][1][0].strip()},"):
        table.plain = False
        table.notes.append(f"{path.name} has no header; its columns are read as filename,prompt.")
        columns = ["filename", "prompt"]
    else:
        records = records[1:]
    name_at = next((columns.index(column) for column in NAME_COLUMNS if column in columns), None)
    text_at = next((columns.index(column) for column in TEXT_COLUMNS if column in columns), None)
    if name_at is None or text_at is None:
        lacking = "filename (or file_name, image)" if name_at is None else "prompt (or caption, text)"
        wanted = NAME_COLUMNS if name_at is None else TEXT_COLUMNS
        near = next((hint for hint in (did_you_mean(column, wanted) for column in columns) if hint), "")
        raise DataError(
            f"{path}: no column {lacking}. It has: {', '.join(columns) or 'none'}.{near} "
            "The first line should be: filename,prompt"
        )
    table.extra_columns = [column for at, column in enumerate(columns) if at not in (name_at, text_at) and column]
    joined: list[int] = []
    for line, cells in records:
        surplus = len(cells) - len(columns)
        if surplus > 0:
            if any(cell.strip() for cell in cells[text_at + 1 : text_at + surplus + 1]):
                joined.append(line)
            # The caption is the column that holds commas; what stands behind it keeps its place counted from the end.
            cells = [
                *cells[:text_at],
                delimiter.join(cells[text_at : text_at + surplus + 1]),
                *cells[text_at + surplus + 1 :],
            ]
        cells = cells + [""] * (len(columns) - len(cells))
        name, caption = _plain_cell(cells[name_at]), normalise_caption(_plain_cell(cells[text_at].strip()))
        if surplus > 0:
            caption = caption.rstrip(", ")
        if not name.strip():
            table.problems.append(Problem("bad row", f"line {line}", "has a caption but no file name"))
            continue
        extra = {column: cells[at] for at, column in enumerate(columns) if column in table.extra_columns}
        table.rows.append(CaptionRow(line, name, caption, extra, _further(extra)))
    if joined:
        rows = "1 row" if len(joined) == 1 else f"{len(joined)} rows"
        table.notes.append(
            f"{path.name}: the captions of {rows} hold commas without quotes (first in line {joined[0]}); their parts were "
            'joined. Put such captions in double quotes: a.png,"a cat, sitting"'
        )


def _csv_records(text: str, delimiter: str, path: Path, table: RawTable) -> list[tuple[int, list[str]]]:
    """Line numbers and cells; where the quoting is broken, each line is taken by itself."""
    csv.field_size_limit(MAX_TABLE_BYTES)
    records: list[tuple[int, list[str]]] = []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        line = 1
        for cells in reader:
            # A quote that was never closed swallows the rows up to the next one.
            if any("\n" in cell and _PICTURE_ROW.search(cell.split("\n", 1)[1]) for cell in cells):
                raise csv.Error(f"line {line}: a quotation mark is not closed")
            if any(cell.strip() for cell in cells):
                records.append((line, cells))
            line = reader.line_num + 1
        return records
    except csv.Error:
        records.clear()
    odd = 0
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip(f" {delimiter}"):
            continue
        try:
            cells = next(csv.reader([content], delimiter=delimiter, strict=True))
        except csv.Error:
            odd = odd or line
            cells = [cell.strip().strip('"').replace('""', '"') for cell in content.split(delimiter)]
        records.append((line, cells))
    table.plain = False
    table.notes.append(f"{path.name} line {odd or 1}: quotation marks do not pair up; lines were read one by one.")
    return records


def _plain_cell(cell: str) -> str:
    """The cell without the apostrophe that keeps spreadsheets from computing it."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA_STARTS) else cell
