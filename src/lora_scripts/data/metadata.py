"""The captions of a folder's pictures, from tables, sidecar files and folder names; writing the table.

Each picture of the folder is found by name, in whatever spelling the file system and the table use. Nothing is guessed
silently, what fits nothing is reported by name, and no row reaches outside the folder.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lora_scripts.atomic import write_atomically
from lora_scripts.data.caption_files import (
    FORMULA_STARTS,
    Problem,
    RawTable,
    decode_text,
    normalise_caption,
    read_table,
)
from lora_scripts.data.images import list_images
from lora_scripts.data.masks import is_mask
from lora_scripts.errors import DataError

__all__ = ["CaptionTable", "Problem", "read_captions", "write_metadata"]

TABLE_NAMES = ("metadata.csv", "metadata.jsonl")
SIDECAR_SUFFIXES = (".txt", ".caption")
MAX_SIDECAR_BYTES = 1_000_000
MAX_FOLDER_REPEATS = 999
"""`10_cat` repeats ten times; `2024_holiday` is a year."""

_REPEATS = re.compile(r"([0-9]+)_(.*)")


@dataclass
class CaptionTable:
    """Captions of a folder's pictures.

    Attributes:
        captions: by relative name with forward slashes, in the folder's order; never empty texts.
        more: further captions of pictures that have several, by relative name.
        repeats: from kohya folders such as `10_cat`; a picture that is missing here repeats once.
        notes: complete sentences about what was read in an unusual way, each said once.
        problems: pictures without a caption and rows without a picture, by name.
        pictures: relative names of all pictures of the folder, in natural order.
        origins: where each caption comes from: "table", "sidecar" or "folder".
        source: the table that was read, if any.
        raw: that table as read.
        unmatched: captions of rows that belong to no picture, by the name in the table.
        extra: the further columns of a row, by relative name or by the name in the table.
    """

    captions: dict[str, str] = field(default_factory=dict)
    more: dict[str, Sequence[str]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    source: Path | None = None
    raw: RawTable = field(default_factory=RawTable)
    unmatched: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Mapping[str, str]] = field(default_factory=dict)


def read_captions(
    train_data_dir: Path,
    metadata_path: Path | None,
    *,
    look_for_table: bool = True,
    without: Sequence[str] = (),
    per_line: bool = False,
) -> CaptionTable:
    """The captions of the pictures in a folder.

    From the table first (`metadata_path`, or without it `metadata.csv` or `metadata.jsonl` in the folder), else from the
    `.txt` or `.caption` file beside a picture, else, where there is no table, from the name of a kohya folder.

    Args:
        look_for_table: whether a table in the folder is read that nobody named.
        without: folders inside of it, relative to it with forward slashes, that are not looked into.
        per_line: each line of a caption file is a caption of its own; else they are one.
    Raises:
        DataError: the folder or the named table is not there, or the table cannot be read at all.
    """
    folder = Path(train_data_dir)
    names = [path.relative_to(folder).as_posix() for path in list_images(folder)]
    names = [name for name in names if not any(name.startswith(f"{part}/") for part in without)]
    stems = {str(PurePosixPath(name).with_suffix("")) for name in names}
    table = CaptionTable(pictures=[name for name in names if not is_mask(name, stems)])
    if metadata_path is not None or look_for_table:
        table.source = _find_table(folder, metadata_path, table.notes)
    if table.source is not None:
        table.raw = read_table(table.source)
        table.notes += table.raw.notes
        table.problems += table.raw.problems
        _match_rows(table)
    _read_sidecars(table, folder, per_line)
    _read_folder_names(table)
    for name in table.pictures:
        if not _is_text(name):
            table.captions.pop(name, None)
            table.problems.append(Problem("bad name", name, "its name is not valid Unicode: rename the file"))
        elif name not in table.captions:
            where = "no caption table in the folder"
            if table.source is not None:
                row = "an empty caption" if name in table.extra else "no row"
                where = f"{row} in {table.source.name}"
            table.problems.append(Problem("no caption", name, f"{where}, and no .txt or .caption file beside it"))
    table.captions = {name: table.captions[name] for name in table.pictures if name in table.captions}
    if table.more:
        who = "1 picture has" if len(table.more) == 1 else f"{len(table.more)} pictures have"
        table.notes.append(f"{who} several captions; every use of one draws one of them.")
    return table


def _find_table(folder: Path, metadata_path: Path | None, notes: list[str]) -> Path | None:
    if metadata_path is None:
        present = [folder / name for name in TABLE_NAMES if (folder / name).is_file()]
        if len(present) > 1:
            notes.append(f"{present[0].name} is read; {present[1].name} lies beside it and is ignored.")
        return present[0] if present else None
    path = Path(metadata_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Give the table in it, such as {path / 'metadata.csv'}.")
    near = sorted(item.name for item in path.parent.glob("*") if item.suffix.lower() in (".csv", ".jsonl", ".tsv"))
    beside = f" There is {', '.join(near[:3])} in that folder." if near else ""
    command = "python tools/auto_label.py" if Path("tools/auto_label.py").is_file() else "lora-scripts label"
    raise DataError(
        f"{path}: no such caption table.{beside} Write one with: "
        f'{command} --input "{folder}" --output "{path}"\n'
        "Or leave metadata_path out: then .txt files beside the pictures are read."
    )


class _Names:
    """Finds the picture that a row means; each looser way counts only where one single picture fits."""

    def __init__(self, names: Sequence[str]) -> None:
        self.exact = set(names)
        self.looser: dict[str, dict[str, list[str]]] = {
            "": defaultdict(list),
            "in another case": defaultdict(list),
            "without its extension": defaultdict(list),
            "without its folder": defaultdict(list),
        }
        for name in names:
            composed = unicodedata.normalize("NFC", name)
            keys = (
                composed,
                composed.casefold(),
                str(PurePosixPath(composed).with_suffix("")),
                composed.split("/")[-1],
            )
            for index, key in zip(self.looser.values(), keys, strict=True):
                index[key].append(name)

    def find(self, written: str) -> tuple[str | None, str]:
        """The picture's name and the way it was found, or None and the reason."""
        if written in self.exact:
            return written, ""
        name = written.strip().replace("\\", "/")
        while name.startswith("./"):
            name = name[2:]
        if name in self.exact:
            return name, ""
        if re.match(r"[a-z][a-z0-9+.-]*://", name, re.IGNORECASE):
            return None, "is an address on the web; give the name of a file in the folder"
        if name.startswith("/") or re.match(r"[a-zA-Z]:", name):
            return None, "is an absolute path; write it relative to the folder of pictures"
        if ".." in name.split("/"):
            return None, "leads out of the folder of pictures"
        composed = unicodedata.normalize("NFC", name)
        ambiguous = ""
        for way, index in self.looser.items():
            key = composed.casefold() if way == "in another case" else composed
            key = key.split("/")[-1] if way == "without its folder" else key
            found = index.get(key, [])
            if len(found) == 1:
                return found[0], way
            if len(found) > 1:
                ambiguous = ambiguous or f"fits several pictures: {', '.join(found[:3])}"
        return None, ambiguous or "no such picture in the folder"


def _match_rows(table: CaptionTable) -> None:
    """Fill in the captions of the table's rows; of several rows for one picture the last with a text counts."""
    names = _Names(table.pictures)
    found = [names.find(row.name) for row in table.raw.rows]
    # A row that names its picture exactly is not displaced by one that only resembles it: the picture which that one
    # means may have been deleted.
    exact = {name for name, how in found if name is not None and not how}
    lines: dict[str, list[int]] = defaultdict(list)
    ways: dict[str, list[str]] = defaultdict(list)
    for row, (name, how) in zip(table.raw.rows, found, strict=True):
        if name is not None and how and name in exact:
            name, how = None, "no such picture in the folder"
        if name is None:
            kind = {"no": "no picture", "fits": "ambiguous name"}.get(how.split()[0], "refused name")
            table.problems.append(Problem(kind, row.name, f"line {row.line}: {how}"))
            table.unmatched[row.name] = row.text
            table.extra[row.name] = row.extra
            continue
        lines[name].append(row.line)
        if how:
            ways[how].append(row.name)
        if row.text:
            table.captions[name] = row.text
            table.origins[name] = "table"
            table.more.pop(name, None)
            if row.more:
                table.more[name] = row.more
        table.extra[name] = row.extra
    source = table.source.name if table.source else ""
    for way, written in ways.items():
        verb = "was" if len(written) == 1 else "were"
        table.notes.append(f"{source}: {_named(written)} {verb} matched to a picture {way}.")
    repeated = [f"{name} (lines {', '.join(map(str, at))})" for name, at in lines.items() if len(at) > 1]
    if repeated:
        table.notes.append(f"{source}: several rows for one picture, the last one counts: {_named(repeated)}.")


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_sidecars(table: CaptionTable, folder: Path, per_line: bool) -> None:
    """Fill in captions from `a.png.txt`, `a.txt`, `a.png.caption` or `a.caption` beside `a.png`."""
    listings: dict[Path, set[str]] = {}
    users: dict[Path, list[str]] = defaultdict(list)
    for name in table.pictures:
        if name in table.captions:
            continue
        picture = folder / name
        if picture.parent not in listings:
            listings[picture.parent] = {item.name for item in picture.parent.iterdir()}
        for suffix in SIDECAR_SUFFIXES:
            found = [
                part for part in (picture.name + suffix, picture.stem + suffix) if part in listings[picture.parent]
            ]
            if not found:
                continue
            sidecar = picture.parent / found[0]
            try:
                if sidecar.stat().st_size > MAX_SIDECAR_BYTES:
                    raise DataError(f"{sidecar}: larger than {MAX_SIDECAR_BYTES // 1000} kB")
                whole = decode_text(sidecar.read_bytes(), sidecar)[0]
            except (DataError, OSError) as error:
                table.problems.append(Problem("bad sidecar", f"{name}", f"{sidecar.name}: {error}"))
                continue
            lines = whole.splitlines() if per_line else [whole]
            texts = [text for text in map(normalise_caption, lines) if text]
            if texts:
                table.captions[name] = texts[0]
                table.origins[name] = "sidecar"
                if len(texts) > 1:
                    table.more[name] = texts[1:]
                users[sidecar].append(name)
                break
    count = sum(len(names) for names in users.values())
    if count and table.source is not None:
        table.notes.append(
            f"{count} caption{'s come' if count > 1 else ' comes'} from .txt or .caption files, for pictures without a row in {table.source.name}."
        )
    shared = [f"{sidecar.name} ({', '.join(names)})" for sidecar, names in users.items() if len(names) > 1]
    if shared:
        table.notes.append(
            f"One caption file stands for several pictures: {_named(shared)}. Name them a.jpg.txt, a.png.txt to tell them apart."
        )


def _read_folder_names(table: CaptionTable) -> None:
    """Repeats, and captions of last resort, from folders such as `10_cat`."""
    captioned: dict[str, int] = defaultdict(int)
    for name in table.pictures:
        top, _, rest = name.partition("/")
        match = _REPEATS.fullmatch(top) if rest else None
        if match is None or not 1 <= int(match[1]) <= MAX_FOLDER_REPEATS:
            continue
        table.repeats[name] = int(match[1])
        text = normalise_caption(match[2])
        if name not in table.captions and text and table.source is None:
            table.captions[name] = text
            table.origins[name] = "folder"
            captioned[text] += 1
    for text, count in captioned.items():
        who = "1 picture has" if count == 1 else f"{count} pictures have"
        table.notes.append(f"{who} no caption of their own; the folder's name is used: {text}.")


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_metadata(
    path: Path,
    rows: Mapping[str, str],
    *,
    extra_columns: Sequence[str] = (),
    extra: Mapping[str, Mapping[str, str]] | None = None,
    spreadsheet_safe: bool = False,
    bom: bool = False,
) -> None:
    """Replace the CSV at `path` by the header `filename,prompt` and one row per picture: UTF-8, RFC 4180 quoting, atomic.

    Args:
        rows: captions by file name, in the order in which they are written.
        extra_columns, extra: further columns and their cells by file name; they belong to the user.
        spreadsheet_safe: cells that a spreadsheet would compute (they begin with = + - @) get an apostrophe in front, which
            `read_table` takes away again.
        bom: begin with the mark that lets Excel show Chinese rightly.
    Raises:
        DataError: the file cannot be written, or a name is not valid Unicode.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["filename", "prompt", *extra_columns])
    for name, caption in rows.items():
        if not _is_text(name):
            raise DataError(
                f"{path}: a file name is not valid Unicode and cannot stand in it: {name!r}. Rename that file."
            )
        further = (extra or {}).get(name, {})
        cells = [name, normalise_caption(caption), *(further.get(column, "") for column in extra_columns)]
        if spreadsheet_safe:
            cells = [f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell for cell in cells]
        writer.writerow(cells)
    write_atomically(path, ("\ufeff" if bom else "") + text.getvalue())
