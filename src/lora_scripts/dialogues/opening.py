"""The dialogues of a run: which files are read, which of their rows can be used."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_scripts.data.dataset import LeftOut
from lora_scripts.dialogues.conversation import Dialogue, Message, content_digest
from lora_scripts.dialogues.dialogue_set import NAMED_IN_EXCLUDE, SHOWN, DialogueData, DialogueSet
from lora_scripts.dialogues.formats import RowContent, RowError, parse_row
from lora_scripts.dialogues.reader import ROW_SUFFIXES, SourceRow, read_rows
from lora_scripts.dialogues.text_lines import mended
from lora_scripts.dialogues.turns import IS_EMPTY, NothingToLearnError, put_in_order
from lora_scripts.errors import DataError

__all__ = ["MOST_BAD", "open_dialogues"]

MOST_BAD = 0.1
"""Share of rows that may be unreadable; beyond it the file is another one than the user thinks."""

Parse = Callable[[object], RowContent]
"""From a row as JSON says it to its content; raises RowError."""

_DEV = re.compile(r"(dev|eval|evaluation|valid|validation|val)([-_.].*)?", re.IGNORECASE)
_TEST = re.compile(r"test([-_.].*)?", re.IGNORECASE)


def open_dialogues(
    path: Path,
    *,
    exclude: Sequence[str] = (),
    system_prompt: str | None = None,
    repeats: int = 1,
    parse: Parse = parse_row,
) -> DialogueData:
    """The rows of a file, or of the files in a folder, in the order of their names and lines.

    In a folder the files `train*` train, or where there are none all others; `dev*`, `eval*` and `valid*` are what a run is
    measured on, `test*` is left alone. Sub-folders count; what begins with a dot does not.

    Args:
        exclude: patterns for names of files (`old/*.jsonl`) or of rows (`train.jsonl:12`).
        system_prompt: put in front of dialogues that have no system text.
        repeats: uses of each row per epoch.
        parse: what makes sense of a row; `pairs.parse_pair` for pairs of answers.
    Raises:
        DataError: nothing is there, more than a tenth of the rows cannot be read, or none is left.
    """
    train_files, dev_files, notes = _find_files(path, exclude)
    folder = path if path.is_dir() else path.parent

    def rows_of(files: Sequence[Path], repeats: int) -> DialogueSet:
        return _read_files(files, folder, exclude, repeats, lambda row: _understand(row, system_prompt, parse))

    train = rows_of(train_files, repeats)
    dev = rows_of(dev_files, 1) if dev_files else None
    if not train.examples:
        named = "\n".join(f"  {item.name}: {item.reason}" for item in train.left_out[:SHOWN])
        if not named:
            raise DataError(f"{path}: holds no rows. Write one JSON object per line, such as {_EXAMPLE}")
        raise DataError(f"{path}: none of its {len(train.left_out)} rows can be trained on:\n{named}")
    if dev is not None and not dev.examples:
        notes.append(f"{_names(dev_files, folder)}: no row of it can be used; it is ignored.")
        dev = None
    return DialogueData(train, dev, notes)


_EXAMPLE = '{"input": "Where is my parcel?", "output": "It arrives today."}'


def _find_files(path: Path, exclude: Sequence[str]) -> tuple[list[Path], list[Path], list[str]]:
    """The files to train on, those to measure on, and sentences about the choice."""
    if path.is_file():
        if path.suffix.lower() not in ROW_SUFFIXES:
            raise DataError(
                f"{path}: is none of {', '.join(ROW_SUFFIXES)}. Write it as one JSON object per line (.jsonl)."
            )
        return [path], [], []
    if not path.is_dir():
        raise DataError(
            f"train_data_dir: {path}: no such file or folder. Put the dialogues there, or correct the path."
        )
    files = [
        file
        for file in sorted(path.rglob("*"), key=lambda file: _natural(file.relative_to(path).as_posix()))
        if file.suffix.lower() in ROW_SUFFIXES and file.is_file() and not _hidden(file, path)
        if not any(fnmatch.fnmatchcase(file.relative_to(path).as_posix(), pattern) for pattern in exclude)
    ]
    dev = [file for file in files if _is_for(_DEV, file, path)]
    others = [file for file in files if not _is_for(_DEV, file, path) and not _is_for(_TEST, file, path)]
    train = [file for file in others if file.stem.lower().startswith("train")] or others
    if not train:
        raise DataError(f"{path}: holds no .jsonl, .json or .txt file to train on.{_other_tables(path)}")
    read = {*train, *dev}
    unread = [file for file in files if file not in read]
    notes = [f"{_names(train, path)}: trained on."]
    if dev:
        notes.append(f"{_names(dev, path)}: held back to measure the run on.")
    if unread:
        notes.append(f"{_names(unread, path)}: not read.")
    return train, dev, notes


def _other_tables(folder: Path) -> str:
    tables = sorted(
        file.name for file in folder.iterdir() if file.suffix.lower() in (".parquet", ".csv", ".tsv", ".xlsx")
    )
    return f" {', '.join(tables[:3])} must be written as .jsonl first: one JSON object per line." if tables else ""


def _read_files(
    files: Sequence[Path],
    folder: Path,
    exclude: Sequence[str],
    repeats: int,
    understand: Callable[[SourceRow], tuple[RowContent, list[str]]],
) -> DialogueSet:
    examples: list[Dialogue] = []
    left_out: list[LeftOut] = []
    bad: list[LeftOut] = []
    notes: list[str] = []
    changes: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for row in read_rows(file, _shown(file, folder), notes):
            if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in exclude):
                left_out.append(LeftOut(row.name, NAMED_IN_EXCLUDE))
                continue
            try:
                content, changed = understand(row)
            except NothingToLearnError as fault:
                left_out.append(LeftOut(row.name, str(fault)))
            except RowError as fault:
                bad.append(LeftOut(row.name, str(fault)))
            else:
                digest = content_digest(content.messages, content.text, content.rejected)
                examples.append(Dialogue(row.name, content.messages, content.text, digest, repeats, content.rejected))
                for change in changed:
                    changes[change].append(row.name)
    _require_few_bad(bad, len(examples) + len(left_out) + len(bad), folder)
    for change, names in changes.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"{len(names)} row{'s' if len(names) > 1 else ''}: {change} ({', '.join(names[:3])}{more}).")
    result = DialogueSet(examples, [*bad, *left_out], notes)
    if result.num_copies:
        notes.append(
            f"{result.num_copies} rows are exact copies of earlier ones; they train as often as they stand there."
        )
    return result


HALF_CHARACTERS = "half characters (lone surrogates) were replaced"


def _understand(row: SourceRow, system_prompt: str | None, parse: Parse) -> tuple[RowContent, list[str]]:
    """The row's content as it trains, and what was changed about it."""
    if row.fault:
        raise RowError(row.fault)
    content = parse(row.value)
    if content.messages:
        messages, changes = _ordered(content.messages, system_prompt)
        if not content.rejected:
            return RowContent(messages), changes
        rejected, more = _ordered(content.rejected, system_prompt)
        return RowContent(messages, rejected=rejected), list(dict.fromkeys([*changes, *more]))
    if not content.text.strip():
        raise NothingToLearnError(f"its text {IS_EMPTY}")
    text = mended(content.text)
    return RowContent(text=text), [HALF_CHARACTERS] if text != content.text else []


def _ordered(messages: Sequence[Message], system_prompt: str | None) -> tuple[tuple[Message, ...], list[str]]:
    messages, changes = put_in_order(messages, system_prompt)
    whole = tuple(Message(each.role, mended(each.content), each.trained) for each in messages)
    return whole, changes if whole == messages else [*changes, HALF_CHARACTERS]


def _require_few_bad(bad: Sequence[LeftOut], num_rows: int, folder: Path) -> None:
    """Raises DataError, naming the first twenty, when more than a tenth of the rows cannot be read."""
    if len(bad) <= MOST_BAD * num_rows:
        return
    named = "\n".join(f"  {item.name}: {item.reason}" for item in bad[:SHOWN])
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    raise DataError(
        f"{folder}: {len(bad)} of {num_rows} rows cannot be read, more than {MOST_BAD:.0%}:\n{named}{more}\n"
        "Mend them, or name files or rows that are not meant in exclude."
    )


def _names(files: Sequence[Path], folder: Path) -> str:
    names = [_shown(file, folder) for file in files]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_for(purpose: re.Pattern[str], file: Path, folder: Path) -> bool:
    """Whether the file's name, or that of a folder it lies in, says what it is for."""
    *folders, _ = file.relative_to(folder).parts
    return any(purpose.fullmatch(part) for part in (*folders, file.stem))


def _shown(file: Path, folder: Path) -> str:
    """The file's name as logs and reports can hold it: a file system may give bytes that are no text."""
    return file.relative_to(folder).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts part 2 before part 10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"([0-9]+)", name)]
