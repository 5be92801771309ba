"""Files of a folder, their encodings and their faults."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_scripts.dialogues.opening import open_dialogues
from lora_scripts.dialogues.reader import MOST_CHARACTERS
from lora_scripts.errors import DataError

ROW = {"input": "Hi", "output": "Hello"}


def lines(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"input": f"question {number}", "output": f"answer {number}"} for number in range(count)]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_train_parts_are_read_in_natural_order_and_dev_is_kept_apart(tmp_path: Path) -> None:
    write(tmp_path, "train-10.jsonl", lines([{"input": "z", "output": "z"}]))
    write(tmp_path, "train-2.jsonl", lines(numbered(2)))
    write(tmp_path, "dev.jsonl", lines([ROW]))
    write(tmp_path, "other.jsonl", lines([ROW]))
    write(tmp_path, "test.jsonl", lines([ROW]))
    write(tmp_path, ".cache/train.jsonl", "no data")
    data = open_dialogues(tmp_path)
    assert [row.name for row in data.train.examples] == ["train-2.jsonl:1", "train-2.jsonl:2", "train-10.jsonl:1"]
    assert data.dev is not None
    assert [row.name for row in data.dev.examples] == ["dev.jsonl:1"]
    assert "other.jsonl, test.jsonl: not read." in data.notes


def test_without_train_files_all_but_dev_and_test_train(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b/story.txt", "value.json", "validation.jsonl", "dev/c.jsonl", "test_1.jsonl"):
        write(tmp_path, name, lines([ROW]))
    data = open_dialogues(tmp_path)
    assert [row.name for row in data.train.examples] == ["a.jsonl:1", "b/story.txt:1", "value.json:1"]
    assert data.dev is not None
    assert [row.name for row in data.dev.examples] == ["dev/c.jsonl:1", "validation.jsonl:1"]


def test_row_knows_the_file_that_it_stands_in(tmp_path: Path) -> None:
    write(tmp_path, "a#1/train-1.json", json.dumps(numbered(2)))
    write(tmp_path, "train-2.jsonl", lines(numbered(2)))
    files = [row.file for row in open_dialogues(tmp_path).train.examples]
    assert files == ["a#1/train-1.json"] * 2 + ["train-2.jsonl"] * 2


def test_one_file_is_enough(tmp_path: Path) -> None:
    data = open_dialogues(write(tmp_path, "mine.jsonl", "\n" + lines([ROW]) + "\n"))
    assert [row.name for row in data.train.examples] == ["mine.jsonl:2"]
    assert data.dev is None


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_is_read_and_its_rows_are_counted(tmp_path: Path, indent: int | None) -> None:
    data = open_dialogues(write(tmp_path, "train.json", json.dumps(numbered(3), indent=indent)))
    assert [row.name for row in data.train.examples] == ["train.json#1", "train.json#2", "train.json#3"]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_objects_over_several_lines_are_read(tmp_path: Path, name: str) -> None:
    text = "\n".join(json.dumps(row, indent=2) for row in numbered(2))
    assert len(open_dialogues(write(tmp_path, name, text)).train.examples) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"input": "a", "output": "b"}, {"input": }]', "line 1: is no valid JSON .* in row 2"),
        ('[{"input": "a", "output": "b"},\n', "cut off after row 1"),
    ],
)
def test_damaged_array_says_where(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_dialogues(write(tmp_path, "train.json", text))


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("utf-8", ""), ("utf-8-sig", ""), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16-LE"), ("gb18030", "GBK")],
)
def test_encodings_are_read_and_told(tmp_path: Path, encoding: str, said: str) -> None:
    rows = [{"input": f"你好，第{n}个问题", "output": "包裹今天下午到。"} for n in range(5)]
    data = open_dialogues(write(tmp_path, "train.jsonl", lines(rows).replace("\n", "\r\n").encode(encoding)))
    assert [row.answers[0] for row in data.train.examples] == ["包裹今天下午到。"] * 5
    assert any(f"is {said} text" in note for note in data.train.notes) == bool(said)


def test_damaged_bytes_cost_their_line_and_not_the_encoding(tmp_path: Path) -> None:
    good = [
        line.encode() for line in lines([{"input": f"问题{n}", "output": "好"} for n in range(20)]).splitlines(True)
    ]
    good[4] = good[4].replace("好".encode(), b"\xe5\xa5")
    data = open_dialogues(write(tmp_path, "train.jsonl", b"".join(good)))
    assert len(data.train.examples) == 19
    assert [item.name for item in data.train.left_out] == ["train.jsonl:5"]
    assert "is no UTF-8 text (byte 0xe5 at place" in data.train.left_out[0].reason


def test_bad_rows_are_named_with_line_and_reason_and_the_rest_trains(tmp_path: Path) -> None:
    text = lines(numbered(28)) + '{"input": "a"\n{"title": "x"}\n{"input": "q", "output": ""}\n'
    train = open_dialogues(write(tmp_path, "train.jsonl", text)).train
    assert len(train.examples) == 28
    assert {item.name: item.reason for item in train.left_out}.keys() == {f"train.jsonl:{n}" for n in (29, 30, 31)}
    summary = "\n".join(train.summary())
    assert summary.startswith("28 of 31 dialogues train.")
    assert "left out: train.jsonl:29: is no valid JSON (Expecting ',' delimiter at place 14)" in summary
    assert "left out: train.jsonl:31: the answer is empty" in summary


def test_more_than_a_tenth_bad_stops_with_the_first_twenty(tmp_path: Path) -> None:
    path = write(tmp_path, "train.jsonl", lines(numbered(100)) + "{bad\n" * 25)
    with pytest.raises(DataError, match="25 of 125 rows cannot be read, more than 10%") as caught:
        open_dialogues(path)
    assert str(caught.value).count("is no valid JSON") == 20
    assert "and 5 more" in str(caught.value)


def test_empty_answers_alone_do_not_stop(tmp_path: Path) -> None:
    rows = [*numbered(5), *({"input": "q", "output": ""} for _ in range(5))]
    assert len(open_dialogues(write(tmp_path, "train.jsonl", lines(rows))).train.examples) == 5


def test_exclude_names_files_and_rows(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", lines(numbered(3)))
    write(tmp_path, "train_old.jsonl", "{bad")
    train = open_dialogues(tmp_path, exclude=["*_old.jsonl", "train.jsonl:2"]).train
    assert [row.name for row in train.examples] == ["train.jsonl:1", "train.jsonl:3"]
    assert [(item.name, item.reason) for item in train.left_out] == [("train.jsonl:2", "named in exclude")]


def test_half_characters_are_replaced_and_told(tmp_path: Path) -> None:
    text = lines([ROW]) + '{"input": "a", "output": "b \\ud83d"}\n'
    train = open_dialogues(write(tmp_path, "train.jsonl", text)).train
    assert train.examples[1].answers == ["b \ufffd"]
    assert any("half characters" in note and "train.jsonl:2" in note for note in train.notes)


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="such names exist on Linux alone")
def test_file_name_and_keys_that_are_no_text_can_be_shown(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/train-\xff.jsonl"))
    path.write_text(lines(numbered(20)) + '{"\\ud800": 1}\n')
    data = open_dialogues(tmp_path)
    told = [*data.notes, *data.train.summary(), *(row.name for row in data.train.examples)]
    assert "\n".join(told).encode()
    assert data.train.examples[0].name == "train-\\udcff.jsonl:1"


def test_copies_are_counted_and_have_one_digest(tmp_path: Path) -> None:
    rows = [ROW, ROW, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    train = open_dialogues(write(tmp_path, "train.jsonl", lines(rows))).train
    assert train.num_copies == 2
    assert len({row.digest for row in train.examples}) == 1


def test_digest_follows_content_and_not_the_folder(tmp_path: Path) -> None:
    first = open_dialogues(write(tmp_path, "a/train.jsonl", lines([ROW]))).train
    moved = open_dialogues(write(tmp_path, "b/train.jsonl", lines([ROW]))).train
    other = open_dialogues(write(tmp_path, "c/train.jsonl", lines([{**ROW, "output": "Hello!"}]))).train
    prompted = open_dialogues(tmp_path / "a", system_prompt="Be kind.").train
    assert first.digest == moved.digest
    assert len({first.digest, other.digest, prompted.digest}) == 3


def test_text_file_is_one_text_and_a_long_one_is_cut_at_a_paragraph(tmp_path: Path) -> None:
    write(tmp_path, "short.txt", "\r\nOne.\r\n\r\nTwo.\r\n")
    paragraph = "Some words of a long story. " * 200
    write(tmp_path, "story.txt", "\n\n".join([paragraph] * 50))
    rows = {row.name: row.text for row in open_dialogues(tmp_path).train.examples}
    assert rows["short.txt:2"] == "One.\n\nTwo."
    parts = [text for name, text in rows.items() if name.startswith("story")]
    assert len(parts) == 3
    assert all(len(text) < MOST_CHARACTERS + 2 * len(paragraph) for text in parts)
    assert all(text.rstrip().endswith("story.") for text in parts)
    assert "".join(parts).count("Some words") == 50 * 200


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("train.jsonl", "", "holds no rows"),
        ("data.parquet", "PAR1", "data.parquet must be written as .jsonl first"),
        ("train.jsonl", '{"input": "a", "output": ""}', "none of its 1 rows can be trained on"),
    ],
)
def test_folder_without_anything_to_train_on_says_what_to_do(tmp_path: Path, name: str, text: str, reason: str) -> None:
    write(tmp_path, name, text)
    with pytest.raises(DataError, match=reason):
        open_dialogues(tmp_path)


def test_missing_path_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_dialogues(tmp_path / "nothing")
