"""The caption table during a labelling run: what it holds, whose words they are, and how it is written.

A table belongs to its user. Texts that a person wrote or changed are never replaced, rows and columns that this program does
not know stay, and a table that was saved by someone else while the run goes on is read again before it is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from lora_scripts.atomic import write_atomically
from lora_scripts.captioners.side_file import LabelRecord, SideFile
from lora_scripts.data.metadata import CaptionTable, read_captions, write_metadata
from lora_scripts.errors import DataError

__all__ = ["Sheet"]

SAVE_EVERY_S = 5.0
SAVE_SHARE = 0.05
"""Saving may take at most this share of the time: a table of 100,000 rows is written less often than one of 50."""


class Sheet:
    """The table at `path`, its side file, and the rows as they will be written.

    Attributes:
        table: the folder's captions as they were at the start.
        captions: texts by picture name; they go into the table.
        num_recovered: captions that a killed run had written down but not yet put into the table.
    """

    def __init__(
        self, folder: Path, path: Path, note: Callable[[str], None], *, spreadsheet_safe: bool = False
    ) -> None:
        self.folder, self.path, self.note = folder, path, note
        self.spreadsheet_safe = spreadsheet_safe
        self.side = SideFile.beside(path)
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is a folder. Name a file in it, such as {path / 'metadata.csv'}.")
        self.table = self._read()
        # A folder's name is a fallback for training; it is no reason not to caption a picture.
        self.captions = {
            name: text for name, text in self.table.captions.items() if self.table.origins[name] != "folder"
        }
        self._on_disk = {name: text for name, text in self.captions.items() if self.table.origins[name] == "table"}
        self._stamp = _stamp(path)
        self._backed_up = False
        self._saved_at = time.monotonic()
        self._save_took_s = 0.0
        self._warned = False
        recovered = [name for name in self.side.unsaved if name in self.table.pictures and name not in self.captions]
        self.captions |= {name: self.side.records[name].text for name in recovered}
        self.num_recovered = len(recovered)

    def _read(self) -> CaptionTable:
        if self.path.exists():
            return read_captions(self.folder, self.path)
        # A metadata.jsonl is taken over into the metadata.csv beside it. A table of another name is a fresh start: whoever
        # compares two captioners wants each to caption all pictures.
        usual = self.path.absolute() == (self.folder / "metadata.csv").absolute()
        table = read_captions(self.folder, None, look_for_table=usual)
        if table.source is not None:
            self.note(f"Captions in {table.source} are taken over into {self.path}.")
        return table

    @property
    def num_unsaved(self) -> int:
        """Rows that the file on disk lacks or has in another wording."""
        return sum(self._on_disk.get(name) != text for name, text in self.captions.items())

    def is_human(self, name: str) -> bool:
        """Whether a person wrote or changed this picture's caption."""
        return name in self.captions and not self.side.is_machine_text(name, self.captions[name])

    def put(self, records: list[LabelRecord]) -> None:
        """Take in machine-written captions; they are in the side file before this returns, and soon in the table.

        A row that a person filled in or changed while the picture was on its way keeps the person's words.
        """
        records = [record for record in records if not self.is_human(record.filename)]
        self.side.append(records)
        self.captions |= {record.filename: record.text for record in records}
        elapsed = time.monotonic() - self._saved_at
        if elapsed > max(SAVE_EVERY_S, self._save_took_s / SAVE_SHARE):
            try:
                self.save()
            except DataError as error:  # open in a spreadsheet, say: the side file holds everything, so the run goes on
                self._saved_at = time.monotonic()
                if not self._warned:
                    self.note(f"{error} The captions are safe in {self.side.path.name}; writing is tried again.")
                    self._warned = True

    def save(self, *, backup: bool = False) -> None:
        """Write the table if anything changed, after taking in what others wrote to it meanwhile.

        Args:
            backup: keep the table as it was at the start as `NAME.bak`. Done in any case where it was not plain UTF-8.
        Raises:
            DataError: the table cannot be written, or was spoilt by another program meanwhile.
        """
        began = time.monotonic()
        if _stamp(self.path) != self._stamp:
            self._merge()
        if self.num_unsaved or (self.captions and not self.path.exists()):
            if (backup or not self.table.raw.plain) and not self._backed_up and self.path.is_file():
                copy = self.path.with_name(self.path.name + ".bak")
                write_atomically(copy, self.path.read_bytes())
                self.note(f"The table as it was before is kept as {copy.name}.")
                self._backed_up = True
            self.side.sync()
            ordered = {name: self.captions[name] for name in self.table.pictures if name in self.captions}
            write_metadata(
                self.path,
                {**ordered, **self.table.unmatched},
                extra_columns=self.table.raw.extra_columns,
                extra=self.table.extra,
                spreadsheet_safe=self.spreadsheet_safe,
                bom=self.spreadsheet_safe or self.table.raw.bom,
            )
            self._on_disk = dict(self.captions)
            self._stamp = _stamp(self.path)
        self.side.mark_saved(len(self.captions))
        self._saved_at = time.monotonic()
        self._save_took_s = self._saved_at - began

    def _merge(self) -> None:
        """Take in a table that someone else saved while this run was going on: their words win."""
        if not self.path.exists():
            self._on_disk, self._stamp = {}, None
            return
        theirs = read_captions(self.folder, self.path)
        new = {name: text for name, text in theirs.captions.items() if theirs.origins[name] == "table"}
        changed = [
            name for name, text in new.items() if self._on_disk.get(name) != text and self.captions.get(name) != text
        ]
        for name in changed:
            self.captions[name] = new[name]
        for name in (
            self._on_disk.keys() - new.keys()
        ):  # a row that was deleted stays deleted, unless written anew since
            if self.captions.get(name) == self._on_disk[name]:
                del self.captions[name]
        if changed:
            self.note(
                f"{self.path.name} was edited during the run; {len(changed)} changed captions are kept as edited."
            )
        self.table.raw, self.table.unmatched, self.table.extra = theirs.raw, theirs.unmatched, theirs.extra
        self._on_disk, self._stamp = new, _stamp(self.path)

    def finish(self, *, backup: bool = False) -> None:
        """Save for the last time and tidy the side file."""
        self.save(backup=backup)
        self.side.compact(len(self.captions))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
