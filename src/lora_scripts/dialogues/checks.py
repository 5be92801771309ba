"""All findings about dialogues before a run, in one call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import median

from lora_scripts.data.dataset import LeftOut
from lora_scripts.dialogues.check_rows import check_rows
from lora_scripts.dialogues.dialogue_set import NAMED_IN_EXCLUDE, DialogueData
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.tokenised_set import TokenisedSet
from lora_scripts.dialogues.turns import IS_EMPTY
from lora_scripts.preflight.findings import Finding, Report
from lora_scripts.preflight.wording import count
from lora_scripts.words import DIALOGUES

__all__ = ["check_dialogues"]

MOST_WITHOUT_USE = 0.5
"""Share of rows that may fall out; beyond it the template or `max_length` does not fit the data."""
VERY_LONG = 10
"""Times the middle length from which a row is an oddity."""
FEWEST_TOKENS = 1000
"""Tokens below which no row is called very long."""
VERY_SHORT = 2
"""Learnt tokens of an answer that says next to nothing: one and its end."""

_OF_SEVERAL = re.compile(r" (?:answer|part) [0-9]+$")
"""What stands behind a row's name where it has several examples."""


def check_dialogues(data: DialogueData, tokens: TokenisedSet, template: ChatTemplate) -> Report:
    """What can be said of the data before a run.

    Args:
        data: as `open_dialogues` read it.
        tokens: the rows of `data.train` as `tokenise` gave them.
    """
    findings = [
        *_left_out(data, tokens),
        *_cut(tokens),
        *check_rows(data.train, data.dev, template.special_tokens),
        *_lengths(tokens),
    ]
    rows_trained = {_OF_SEVERAL.sub("", example.name) for example in tokens.examples}
    return Report(findings, len(rows_trained), _num_rows(data), words=DIALOGUES)


def _num_rows(data: DialogueData) -> int:
    """All rows but those that the user left out."""
    return len(data.train.examples) + sum(item.reason != NAMED_IN_EXCLUDE for item in data.train.left_out)


def _left_out(data: DialogueData, tokens: TokenisedSet) -> Iterable[Finding]:
    total = _num_rows(data)
    if not tokens.examples:
        yield Finding("red", "no-dialogues", "Nothing is left to train on.", remedy="See the reasons below.")
    empty = [item for item in data.train.left_out if item.reason.endswith(IS_EMPTY)]
    bad = [item for item in data.train.left_out if item not in empty and item.reason != NAMED_IN_EXCLUDE]
    if bad:
        yield Finding(
            "amber",
            "unreadable",
            f"{len(bad):,} of {count(total, 'row')} cannot be used and {_do(bad)} not train.",
            *_named(bad, "Mend or remove them."),
        )
    if empty:
        yield Finding(
            "amber",
            "answers-empty",
            f"{len(empty):,} of {count(total, 'row')} {'has' if len(empty) == 1 else 'have'} an empty answer and {_do(empty)} not train.",
            *_named(empty, "Write the answers, or remove the rows."),
        )
    if tokens.left_out:
        many = len(tokens.left_out) > MOST_WITHOUT_USE * max(1, len(data.train.examples))
        yield Finding(
            "red" if many else "amber",
            "nothing-to-learn",
            f"{count(len(tokens.left_out), 'example')} {_do(tokens.left_out)} not train: the chat template refuses {_them(tokens.left_out)}, or no learnt token is left within {tokens.max_length:,} tokens.",
            *_named(
                tokens.left_out,
                "Shorten them, raise max_length, or put the turns in the order that the template wants.",
            ),
        )


def _cut(tokens: TokenisedSet) -> Iterable[Finding]:
    if not tokens.cut:
        return
    longest = max(tokens.cut.values())
    total = len(tokens.examples)
    yield Finding(
        "amber",
        "truncated",
        f"{len(tokens.cut):,} of {count(total, 'example')} ({len(tokens.cut) / total:.0%}) are longer than max_length {tokens.max_length:,} and lose their end, so that their last answer does not end.",
        list(tokens.cut),
        f"Raise max_length (the longest has {longest:,} tokens), or shorten them.",
        {
            name: f"{length:,} tokens, {length - tokens.max_length:,} of them are cut"
            for name, length in tokens.cut.items()
        },
    )


def _lengths(tokens: TokenisedSet) -> Iterable[Finding]:
    examples = tokens.examples
    if not examples:
        return
    lengths = {example.name: tokens.cut.get(example.name, example.cost) for example in examples}
    middle = median(lengths.values())
    long = [name for name, length in lengths.items() if length > max(FEWEST_TOKENS, VERY_LONG * middle)]
    if long:
        yield Finding(
            "note",
            "very-long",
            f"{count(len(long), 'example')} {'has' if len(long) == 1 else 'have'} more than {VERY_LONG} times the middle length ({middle:,.0f} tokens).",
            long,
            details={name: f"{lengths[name]:,} tokens" for name in long},
        )
    short = [example.name for example in examples if example.num_trained <= VERY_SHORT]
    if short and len(short) < len(examples) / 2:
        yield Finding(
            "note",
            "very-short",
            f"{count(len(short), 'example')} {'has' if len(short) == 1 else 'have'} at most {VERY_SHORT} learnt tokens.",
            short,
        )
    share = tokens.num_trained / tokens.num_tokens
    yield Finding(
        "note",
        "tokens",
        f"{count(len(examples), 'example')}, {tokens.num_tokens:,} tokens (middle {middle:,.0f}, longest {max(lengths.values()):,}); {share:.0%} of them are learnt.",
    )


def _named(items: Sequence[LeftOut], remedy: str) -> tuple[list[str], str, dict[str, str]]:
    return [item.name for item in items], remedy, {item.name: item.reason for item in items}


def _do(items: Sequence[LeftOut]) -> str:
    return "does" if len(items) == 1 else "do"


def _them(items: Sequence[LeftOut]) -> str:
    return "it" if len(items) == 1 else "them"
