"""Captions on several processes: each writes a journal of its own, and the first puts them all into the table.

A journal `metadata.labels.part-1.jsonl` outlives a run that is broken off; the next run, on however many processes, takes
its captions over.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.captioners.sheet import Sheet
from lora_scripts.captioners.side_file import SideFile

if TYPE_CHECKING:
    from lora_scripts.captioners.side_file import LabelRecord

__all__ = ["PartSheet", "has_parts", "take_in_parts"]


class PartSheet(Sheet):
    """The table as a process sees that is not the first: read as always, never written."""

    def journal(self, index: int) -> None:
        """Sends what is put from here on to the journal of this process."""
        self._part = SideFile.read(self.side.path.with_suffix(f".part-{index}.jsonl"))

    def put(self, records: list[LabelRecord]) -> None:
        records = [record for record in records if not self.is_human(record.filename)]
        self._part.append(records)
        self.captions |= {record.filename: record.text for record in records}

    def finish(self, *, backup: bool = False) -> None:
        """Nothing: the first process writes."""


def has_parts(table: Path) -> bool:
    """Whether journals lie beside a table."""
    return bool(_parts(SideFile.beside(table).path))


def take_in_parts(sheet: Sheet) -> int:
    """Puts the captions of all journals beside the table into it, and removes the journals; how many there were."""
    taken = 0
    for path in sorted(_parts(sheet.side.path)):
        records = list(SideFile.read(path).records.values())
        sheet.put(records)
        sheet.side.sync()
        path.unlink()
        taken += len(records)
    return taken


def _parts(side_file: Path) -> list[Path]:
    return list(side_file.parent.glob(f"{glob.escape(side_file.stem)}.part-*.jsonl"))
