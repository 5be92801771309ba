"""The side file: a journal that survives being cut off anywhere, and the memory of what the machine wrote."""

import json
import os
from pathlib import Path

import pytest

from lora_scripts.captioners.side_file import LabelRecord, SideFile, text_digest
from lora_scripts.errors import DataError


def record(name: str, text: str) -> LabelRecord:
    return LabelRecord(filename=name, text=text, caption=text, score=0.5, models={"model": "m"})


def test_records_are_read_back(tmp_path: Path) -> None:
    side = SideFile.beside(tmp_path / "metadata.csv")
    side.append([record("猫.png", "一只猫"), record("b.png", "a dog")])
    again = SideFile.beside(tmp_path / "metadata.csv")
    assert again.path.name == "metadata.labels.jsonl"
    assert again.records == side.records
    assert again.records["猫.png"].models == {"model": "m"}


def test_rows_after_the_last_mark_have_not_reached_the_table(tmp_path: Path) -> None:
    side = SideFile.beside(tmp_path / "metadata.csv")
    side.append([record("a.png", "a")])
    side.mark_saved(1)
    side.append([record("b.png", "b")])
    assert SideFile.beside(tmp_path / "metadata.csv").unsaved == {"b.png"}


def test_a_journal_cut_at_any_byte_keeps_every_whole_line(tmp_path: Path) -> None:
    side = SideFile.beside(tmp_path / "metadata.csv")
    for number in range(4):
        side.append([record(f"{number}.png", f"猫 {number}")])
    data = side.path.read_bytes()
    for cut in {
        *range(0, len(data), 23),
        *(at + shift for at in range(len(data)) if data[at] == 10 for shift in (0, 1)),
    }:
        side.path.write_bytes(data[:cut])
        read = SideFile.beside(tmp_path / "metadata.csv")
        whole = data[:cut].count(b"\n")
        assert whole <= len(read.records) <= whole + 1
        read.append([record("new.png", "new")])
        assert "new.png" in SideFile.beside(tmp_path / "metadata.csv").records


def test_every_text_of_the_machine_is_remembered_as_its_own(tmp_path: Path) -> None:
    side = SideFile.beside(tmp_path / "metadata.csv")
    side.append([record("a.png", "first")])
    side.append([record("a.png", "second")])
    side = SideFile.beside(tmp_path / "metadata.csv")
    assert side.is_machine_text("a.png", "first")
    assert side.is_machine_text("a.png", "  second \r\n")
    assert not side.is_machine_text("a.png", "second thoughts")
    assert not side.is_machine_text("b.png", "first")
    assert side.records["a.png"].text_sha256 == [text_digest("first"), text_digest("second")]


def test_compacting_keeps_the_newest_record_and_all_digests(tmp_path: Path) -> None:
    side = SideFile.beside(tmp_path / "metadata.csv")
    for text in ("one", "two", "three"):
        side.append([record("a.png", text)])
    side.mark_saved(1)
    side.compact(1)
    assert len(side.path.read_text("utf-8").splitlines()) == 2
    again = SideFile.beside(tmp_path / "metadata.csv")
    assert again.records["a.png"].text == "three"
    assert again.is_machine_text("a.png", "one")
    assert not again.unsaved


@pytest.mark.parametrize(
    "line", ["", "{}", "[]", "7", '{"filename": 3, "text": "x", "caption": "x"}', '{"filename": "a"', "\x00\x00", '"x"']
)
def test_lines_of_another_making_are_skipped(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metadata.labels.jsonl"
    good = json.dumps({"filename": "a.png", "text": "a", "caption": "a", "new field of a later version": 1})
    path.write_text(f"{line}\n{good}\n{line}\n", "utf-8")
    assert list(SideFile.beside(tmp_path / "metadata.csv").records) == ["a.png"]


def test_a_link_is_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious", "utf-8")
    os.symlink(tmp_path / "precious", tmp_path / "metadata.labels.jsonl")
    with pytest.raises(DataError, match="symbolic link"):
        SideFile.beside(tmp_path / "metadata.csv").append([record("a.png", "a")])
    assert (tmp_path / "precious").read_text("utf-8") == "precious"
