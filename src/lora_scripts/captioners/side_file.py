"""What is known about each machine-written caption, in `metadata.labels.jsonl` beside `metadata.csv`.

The table keeps its two columns; scores, models, the runner-up and hashes live here. The file is also the journal of a
running job: each caption is appended as soon as it is written, so that a killed run loses nothing that a line was written
for. A line saying how many rows the table held marks that everything above it has reached the table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_scripts.atomic import write_atomically
from lora_scripts.data.caption_files import normalise_caption
from lora_scripts.errors import DataError

__all__ = ["LabelRecord", "SideFile", "text_digest"]

_MARK = "rows_in_table"


def text_digest(text: str) -> str:
    """SHA-256 of a caption as it reads, whatever blanks and line ends an editor made of it."""
    return hashlib.sha256(normalise_caption(text).encode()).hexdigest()


@dataclass(frozen=True)
class LabelRecord:
    """One machine-written caption.

    Attributes:
        text: as it went into the table, after the rules.
        caption: as the model wrote it.
        score: what the captioner ordered its candidates by; `runner_up_score` that of the second best.
        likelihood: geometric mean of the tokens' probabilities, 0..1.
        doubt: 0..1, how much a look at this row pays; `reasons` says why.
        models: names of the models by their part.
        settings: captioner, decoding, prompt, seed, number format: what else decides the caption.
        text_sha256: digests of every text that the machine ever put into this row: a row with another text was changed by a
            person.
    """

    filename: str
    text: str
    caption: str
    score: float = 0.0
    runner_up: str = ""
    runner_up_score: float | None = None
    likelihood: float = 0.0
    doubt: float = 0.0
    reasons: list[str] = field(default_factory=list)
    image_sha256: str = ""
    image_bytes: int = 0
    models: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    text_sha256: list[str] = field(default_factory=list)


_TYPES: dict[str, type | tuple[type, ...]] = {
    "filename": str,
    "text": str,
    "caption": str,
    "score": (int, float),
    "runner_up": str,
    "runner_up_score": (int, float, type(None)),
    "likelihood": (int, float),
    "doubt": (int, float),
    "reasons": list,
    "image_sha256": str,
    "image_bytes": int,
    "models": dict,
    "settings": dict,
    "text_sha256": list,
}


class SideFile:
    """The records of one table, by file name.

    Attributes:
        records: the newest record of each picture.
        unsaved: pictures whose newest record may not have reached the table: the run was ended in between.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, LabelRecord] = {}
        self.unsaved: set[str] = set()
        self.num_unreadable = 0
        self._num_lines = 0

    @classmethod
    def beside(cls, table: Path) -> SideFile:
        """The side file of a table."""
        return cls.read(table.with_name(f"{table.stem}.labels.jsonl"))

    @classmethod
    def read(cls, path: Path) -> SideFile:
        """A side file, read as far as it can be: half a last line is what a killed run leaves."""
        side = cls(path)
        try:
            text = side.path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return side
        except OSError as error:
            raise DataError(f"{side.path}: cannot be read ({error.strerror}). Check its permissions.") from None
        for line in text.split("\n"):
            if line.strip():
                side._num_lines += 1
                side._take(line)
        return side

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            self.num_unreadable += 1
            return
        if isinstance(entry, dict) and _MARK in entry:
            self.unsaved.clear()
            return
        known = {item.name for item in fields(LabelRecord)}
        values = {key: value for key, value in entry.items() if key in known} if isinstance(entry, dict) else {}
        fits = all(isinstance(value, _TYPES[key]) for key, value in values.items())
        if not fits or not {"filename", "text", "caption"} <= values.keys():
            self.num_unreadable += 1
            return
        record = LabelRecord(**values)
        self.records[record.filename] = record
        self.unsaved.add(record.filename)

    def is_machine_text(self, name: str, text: str) -> bool:
        """Whether the machine wrote this text into this picture's row; everything else is a person's."""
        record = self.records.get(name)
        return record is not None and text_digest(text) in record.text_sha256

    def with_history(self, record: LabelRecord) -> LabelRecord:
        """The record with the digests of its own and all earlier machine texts of the picture."""
        before = self.records.get(record.filename)
        digests = dict.fromkeys([*(before.text_sha256 if before else ()), text_digest(record.text)])
        return LabelRecord(**{**asdict(record), "text_sha256": list(digests)})

    def append(self, records: Iterable[LabelRecord]) -> None:
        """Add records to the journal: from here on the end of this process loses none of them."""
        if lines := [self._add(record) for record in records]:
            self._append_lines(lines)

    def _add(self, record: LabelRecord) -> str:
        record = self.with_history(record)
        self.records[record.filename] = record
        self.unsaved.add(record.filename)
        return _line(record)

    def sync(self) -> None:
        """Make the journal outlast a power cut; called before the table is written, which must not run ahead of it."""
        with contextlib.suppress(OSError), open(self.path, "rb+") as file:
            os.fsync(file.fileno())

    def mark_saved(self, num_rows: int) -> None:
        """Note that the table holds everything up to here."""
        if self.unsaved or self._num_lines == 0:
            self._append_lines([json.dumps({_MARK: num_rows})])
            self.unsaved.clear()

    def compact(self, num_rows: int) -> None:
        """Rewrite the file with one line per picture, when a finished run has left older ones in it."""
        if self._num_lines > len(self.records) + 1:
            lines = [*(_line(record) for record in self.records.values()), json.dumps({_MARK: num_rows})]
            write_atomically(self.path, "\n".join(lines) + "\n")
            self._num_lines = len(lines)

    def _append_lines(self, lines: list[str]) -> None:
        if self.path.is_symlink():
            raise DataError(f"{self.path}: is a symbolic link, which is never written through. Remove it.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                # A killed run may have left half a line: it stays one broken line and does not spoil the next.
                before = b"\n" if file.tell() and not _ends_with_newline(self.path) else b""
                file.write(before + "".join(f"{line}\n" for line in lines).encode())
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written ({error.strerror or error}). The captions written so far are safe. Free some "
                "space or check the permissions, then run the same command again."
            ) from error
        self._num_lines += len(lines)


def _line(record: LabelRecord) -> str:
    return json.dumps(asdict(record), ensure_ascii=False, separators=(", ", ": "))


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
