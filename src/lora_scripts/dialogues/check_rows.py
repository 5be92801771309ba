"""Findings about what the rows say: copies, contradictions, garbled letters, marks of a template, unfinished answers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from lora_scripts.dialogues.conversation import Dialogue, Message
from lora_scripts.dialogues.dialogue_set import DialogueSet
from lora_scripts.dialogues.text_lines import is_garbled
from lora_scripts.preflight.findings import Finding
from lora_scripts.preflight.wording import count

__all__ = ["check_rows"]

MANY_CONTRADICTIONS = 0.1
"""Share of rows from which several answers to one question are more than variety."""
LONG_ANSWER = 80
"""Characters from which an answer is prose that should end with a mark; titles and codes are shorter."""
MANY_UNFINISHED = 0.05
A_HABIT = 0.8
"""Share of answers without an end mark from which that is how they are written."""
RARE_SCRIPT = 0.05
FEWEST_ROWS = 20
"""Below this many, habits cannot be told from chance."""

FEWEST_LETTERS = 10

_ASCII_LETTERS = re.compile("[A-Za-z]")
_UNFINISHED = re.compile(r"[\w,;:–—-]$")


def check_rows(train: DialogueSet, dev: DialogueSet | None, marks: Iterable[str]) -> list[Finding]:
    """All findings about the text of rows.

    Args:
        marks: the tokenizer's special tokens, which no row should hold.
    """
    rows = train.examples
    return [
        *_copies(rows),
        *_contradictions(rows),
        *_leaks(rows, dev),
        *_garbled(rows),
        *_template_marks(rows, marks),
        *_unfinished(rows),
        *_scripts(rows),
    ]


def _copies(rows: Sequence[Dialogue]) -> Iterable[Finding]:
    first: dict[str, str] = {}
    copies = {}
    for row in rows:
        if row.digest in first:
            copies[row.name] = f"says what {first[row.digest]} says"
        else:
            first[row.digest] = row.name
    if copies:
        yield Finding(
            "amber",
            "exact-duplicates",
            f"{count(len(copies), 'row')} {_are(copies)} exact copies of earlier ones.",
            list(copies),
            "Remove them, unless they are meant to count more.",
            copies,
        )


def _contradictions(rows: Sequence[Dialogue]) -> Iterable[Finding]:
    answers: dict[tuple[Message, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.messages:
            answers[row.messages[:-1]][row.messages[-1].content].append(row.name)
    groups = [list(given.values()) for given in answers.values() if len(given) > 1]
    named = [name for group in groups for names in group for name in names]
    if not named:
        return
    details = {name: f"other answer in {group[0][0]}" for group in groups for names in group[1:] for name in names}
    many = len(named) > MANY_CONTRADICTIONS * len(rows)
    yield Finding(
        "amber" if many else "note",
        "several-answers",
        f"{count(len(groups), 'question')} {'has' if len(groups) == 1 else 'have'} several different answers ({count(len(named), 'row')}).",
        named,
        "Keep one answer each, unless variety is meant: the loss cannot fall below what they differ by."
        if many
        else "",
        details,
    )


def _leaks(rows: Sequence[Dialogue], dev: DialogueSet | None) -> Iterable[Finding]:
    if dev is None:
        return
    trained = {row.digest: row.name for row in rows}
    leaked = {row.name: f"is {trained[row.digest]}" for row in dev.examples if row.digest in trained}
    if leaked:
        yield Finding(
            "amber",
            "dev-rows-trained",
            f"{len(leaked):,} of {count(len(dev.examples), 'row')} to measure on {_are(leaked)} trained on too, so the measured loss is too good.",
            list(leaked),
            "Remove them from one of the two.",
            leaked,
        )


def _garbled(rows: Sequence[Dialogue]) -> Iterable[Finding]:
    found = {}
    for row in rows:
        fault = next(filter(None, map(is_garbled, _texts(row))), "")
        if fault:
            found[row.name] = fault
    if found:
        yield Finding(
            "amber",
            "encoding-faults",
            f"{count(len(found), 'row')} {'holds' if len(found) == 1 else 'hold'} letters that an earlier program damaged; they would be learnt as they are.",
            list(found),
            "Export the data anew as UTF-8.",
            found,
        )


def _template_marks(rows: Sequence[Dialogue], marks: Iterable[str]) -> Iterable[Finding]:
    wanted = sorted((re.escape(mark) for mark in marks if len(mark) > 2), key=len, reverse=True)
    if not wanted:
        return
    pattern = re.compile("|".join(wanted))
    found = {}
    for row in rows:
        match = next(filter(None, map(pattern.search, _texts(row))), None)
        if match is not None:
            found[row.name] = f"holds {match[0]}"
    if found:
        yield Finding(
            "amber",
            "template-marks",
            f"{count(len(found), 'row')} {'holds' if len(found) == 1 else 'hold'} special tokens of the model as text, as if a template had been applied already.",
            list(found),
            "Take them out: the chat template writes them.",
            found,
        )


def _unfinished(rows: Sequence[Dialogue]) -> Iterable[Finding]:
    ends = {row.name: row.answers[-1].rstrip() for row in rows if row.messages}
    prose = {name: answer for name, answer in ends.items() if len(answer) >= LONG_ANSWER}
    unfinished = [name for name, answer in prose.items() if _UNFINISHED.search(answer)]
    if len(prose) < FEWEST_ROWS or not MANY_UNFINISHED <= len(unfinished) / len(prose) <= A_HABIT:
        return
    yield Finding(
        "amber",
        "answers-unfinished",
        f"{len(unfinished):,} of {count(len(prose), 'long answer')} ({len(unfinished) / len(prose):.0%}) end in mid-sentence.",
        unfinished,
        "Were they cut by the program that wrote them? The model learns to stop there.",
        {name: f"ends: {prose[name][-40:]!r}" for name in unfinished},
    )


def _scripts(rows: Sequence[Dialogue]) -> Iterable[Finding]:
    """A few answers in letters of another script than all others."""
    by_script: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        script = _script(" ".join(row.answers) or row.text)
        if script:
            by_script[script].append(row.name)
    total = sum(map(len, by_script.values()))
    if total < FEWEST_ROWS:
        return
    for script, names in by_script.items():
        if len(names) <= RARE_SCRIPT * total:
            yield Finding(
                "note",
                "other-script",
                f"{count(len(names), 'row')} {_are(names)} mostly {script}, unlike the others.",
                names,
            )


def _script(text: str) -> str:
    """The script of most letters at the beginning, or nothing where there are hardly any."""
    start = text[:300]
    if start.isascii():  # by far the most common case, and a hundred times quicker so
        return "Latin" if len(_ASCII_LETTERS.findall(start)) >= FEWEST_LETTERS else ""
    scripts = Counter(_script_of(letter) for letter in start if letter.isalpha())
    return scripts.most_common(1)[0][0] if scripts.total() >= FEWEST_LETTERS else ""


def _script_of(letter: str) -> str:
    code = ord(letter)
    for last, name in _SCRIPTS:
        if code <= last:
            return name
    return "Chinese, Japanese or Korean"


_SCRIPTS = (
    (0x024F, "Latin"),
    (0x03FF, "Greek"),
    (0x052F, "Cyrillic"),
    (0x05FF, "Hebrew or Armenian"),
    (0x08FF, "Arabic"),
    (0x10FF, "Indian or South-East Asian"),
    (0x1CFF, "of other scripts"),
    (0x2DFF, "Latin"),
)


def _texts(row: Dialogue) -> Iterable[str]:
    return (message.content for message in row.messages) if row.messages else (row.text,)


def _are(things: Sequence[str] | dict[str, str]) -> str:
    return "is" if len(things) == 1 else "are"
