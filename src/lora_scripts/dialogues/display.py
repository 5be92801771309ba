"""What a model would learn, for people: how long examples are, and three of them with marks on what is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lora_scripts.dialogues.tokenised_set import TokenisedExample, TokenisedSet

__all__ = ["BEGIN_LEARNT", "END_LEARNT", "describe_examples", "learnt_runs", "length_histogram"]

BEGIN_LEARNT, END_LEARNT = "[[", "]]"
"""Letters that every terminal can show, also one in a Chinese or Western code page."""
LONGEST_RUN = 400
"""Characters of one run that are shown; its middle is left out beyond that."""
BAR = 40


def describe_examples(tokens: TokenisedSet, tokenizer: Any, count: int = 3) -> list[str]:
    """Lines that show the shortest, the middle and the longest example as text, what is learnt between `[[` and `]]`.

    Args:
        count: examples that are shown, evenly from the shortest to the longest.
    """
    ordered = sorted(tokens.examples, key=lambda example: example.cost)
    if not ordered:
        return []
    places = sorted({round(number * (len(ordered) - 1) / max(1, count - 1)) for number in range(count)})
    lines = [f"What is learnt stands between {BEGIN_LEARNT} and {END_LEARNT}."]
    for example in (ordered[place] for place in places):
        lines.append(f"{example.name}: {example.cost:,} tokens, {example.num_trained:,} learnt")
        text = "".join(
            f"{BEGIN_LEARNT}{_short(run)}{END_LEARNT}" if trained else _short(run)
            for run, trained in learnt_runs(example, tokenizer)
        )
        lines += [f"  | {line}" for line in text.split("\n")]
    return lines


def learnt_runs(example: TokenisedExample, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The example's text in runs that are learnt or not, special tokens included."""
    ids, trained = example.tokens.tolist(), example.trained.tolist()
    begin, before = 0, ""
    for place in range(1, len(ids) + 1):
        if place < len(ids) and trained[place] == trained[begin]:
            continue
        # Decoded from the start each time: a token alone may lose the blank before it.
        upto = tokenizer.decode(ids[:place], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield upto[len(before) :], trained[begin]
        begin, before = place, upto


def length_histogram(tokens: TokenisedSet, most: int = 10) -> list[str]:
    """One line per range of lengths in tokens, before anything was cut: range, number of examples, bar.

    Args:
        most: lines at most, from the shortest to the longest; ranges are of one width, a round number.
    """
    lengths = [tokens.cut.get(example.name, example.cost) for example in tokens.examples]
    if not lengths:
        return []
    shortest, longest = min(lengths) - 1, max(lengths) - 1
    width = next(width for width in _round_numbers() if longest // width - shortest // width < most)
    first = shortest // width
    counts = [0] * (longest // width - first + 1)
    for length in lengths:
        counts[(length - 1) // width - first] += 1
    return [_bar(n * width + 1, (n + 1) * width, count, counts) for n, count in enumerate(counts, start=first)]


def _bar(begin: int, end: int, number: int, counts: Sequence[int]) -> str:
    size = -(-BAR * number // max(counts))
    digits = len(f"{max(counts):,}")
    return f"{f'{begin:,}-{end:,}':>15} tokens {number:>{digits},} {'#' * size}".rstrip()


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _short(text: str) -> str:
    if len(text) <= LONGEST_RUN:
        return text
    half = LONGEST_RUN // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
