"""Rows become examples of tokens: rendered, tokenised, cut to length, from the cache where possible."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lora_scripts.data.cache import EncodingCache, cache_key
from lora_scripts.data.dataset import LeftOut
from lora_scripts.dialogues.conversation import Dialogue
from lora_scripts.dialogues.dialogue_set import DialogueSet
from lora_scripts.dialogues.formats import RowError
from lora_scripts.dialogues.spans import Rendered, TrainOn, render_row
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.token_cache import Chunk, ChunkExample, from_tensors, to_tensors
from lora_scripts.dialogues.tokenised_set import TokenisedExample, TokenisedSet
from lora_scripts.dialogues.tokens_of_text import marked_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ROWS_PER_CHUNK", "tokenise"]

ROWS_PER_CHUNK = 2000
CHARACTERS_PER_CALL = 1_000_000
"""Places in the text are lists of Python numbers, about 50 times the text: for a chunk of long rows they would take gigabytes."""
VERSION = 1
"""Part of every cache key; to be raised when the same rows come to other tokens or marks."""

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) between chunks; may raise to stop: finished chunks stay in the cache."""


def tokenise(
    rows: DialogueSet,
    template: ChatTemplate,
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    cache: EncodingCache | None = None,
    progress: Progress = lambda what, done, total: None,
) -> TokenisedSet:
    """The rows as tokens with marks on what is learnt.

    A dialogue that is longer than `max_length` loses its end; plain text becomes several examples instead, so that nothing
    of it is lost. What has no learnt token left is left out, by name.

    Args:
        max_length: tokens of the longest example.
        cache: where chunks are kept; None keeps nothing.
    """
    cache = cache or EncodingCache(None)
    settings = {"version": VERSION, "max_length": max_length, "train_on": train_on, "template": template.fingerprint}
    examples: list[TokenisedExample] = []
    left_out: list[LeftOut] = []
    cut: dict[str, int] = {}
    remarks: dict[str, list[str]] = defaultdict(list)
    total = len(rows.examples)
    progress("tokens", 0, total)
    for start in range(0, total, ROWS_PER_CHUNK):
        part = rows.examples[start : start + ROWS_PER_CHUNK]
        content = hashlib.sha256("".join(row.digest for row in part).encode()).hexdigest()
        key = cache_key("dialogue tokens", rows=content, **settings)
        chunk = _stored(cache, key)
        if chunk is None:
            chunk = _make_chunk(part, template, max_length, train_on)
            cache.put("tokens", key, to_tensors(chunk))
        for each in chunk.examples:
            row = part[each.row]
            digest = _digest(row, each.suffix)
            examples.append(TokenisedExample(row.name + each.suffix, digest, row.repeats, each.tokens, each.trained))
        left_out += [LeftOut(part[place].name + suffix, reason) for place, suffix, reason in chunk.faults]
        cut.update((part[place].name + suffix, length) for place, suffix, length in chunk.cut)
        for remark, places in chunk.remarks.items():
            remarks[remark] += [part[place].name for place in places]
        progress("tokens", start + len(part), total)
    return TokenisedSet(examples, left_out, cut, [template.note, *_said_once(remarks)], max_length)


def _digest(row: Dialogue, suffix: str) -> str:
    """The row's digest, or one that follows from it where the row has several examples."""
    return hashlib.sha256(f"{row.digest}{suffix}".encode()).hexdigest() if suffix else row.digest


def _stored(cache: EncodingCache, key: str) -> Chunk | None:
    tensors = cache.get("tokens", key)
    return None if tensors is None else from_tensors(tensors)


def _make_chunk(rows: Sequence[Dialogue], template: ChatTemplate, max_length: int, train_on: TrainOn) -> Chunk:
    chunk = Chunk()
    rendered: list[tuple[int, Rendered]] = []
    for place, row in enumerate(rows):
        try:
            texts = render_row(template, row, train_on)
        except RowError as error:
            chunk.faults.append((place, "", str(error)))
            continue
        rendered += [(place, text) for text in texts]
        for remark in texts[0].remarks:
            chunk.remarks.setdefault(remark, []).append(place)
    for group in _groups(rendered):
        marked = marked_tokens(template.tokenizer, [text for _, text in group])
        for (place, text), (tokens, trained) in zip(group, marked, strict=True):
            _add(chunk, place, text, tokens, trained, max_length)
    return chunk


def _groups(rendered: Sequence[tuple[int, Rendered]]) -> Iterator[list[tuple[int, Rendered]]]:
    """What goes through the tokenizer in one call."""
    group: list[tuple[int, Rendered]] = []
    characters = 0
    for item in rendered:
        length = len(item[1].text)
        if group and characters + length > CHARACTERS_PER_CALL:
            yield group
            group, characters = [], 0
        group.append(item)
        characters += length
    if group:
        yield group


def _add(
    chunk: Chunk,
    row: int,
    text: Rendered,
    tokens: NDArray[np.int32],
    trained: NDArray[np.bool_],
    max_length: int,
) -> None:
    """One text's examples: cut at the end, or in pieces."""
    length = len(tokens)
    if not trained.any():
        chunk.faults.append(
            (row, text.suffix, "has nothing to learn: it is a single token" if text.splits else _NOTHING)
        )
    elif length <= max_length:
        chunk.examples.append(ChunkExample(row, text.suffix, tokens, trained))
    elif text.splits:
        for number, (begin, end) in enumerate(_pieces(length, max_length), start=1):
            marks = trained[begin:end].copy()
            marks[0] = False
            chunk.examples.append(ChunkExample(row, f" part {number}", tokens[begin:end], marks))
    elif trained[:max_length].any():
        chunk.cut.append((row, text.suffix, length))
        # Copies, so that a short beginning does not keep the long row in memory.
        chunk.examples.append(ChunkExample(row, text.suffix, tokens[:max_length].copy(), trained[:max_length].copy()))
    else:
        first = int(trained.argmax())
        reason = (
            f"its answer begins at token {first + 1:,}, beyond max_length {max_length}; nothing to learn would be left"
        )
        chunk.faults.append((row, text.suffix, reason))


_NOTHING = "no token of it is to be learnt: its answer becomes no token of its own"


def _pieces(length: int, most: int) -> Iterator[tuple[int, int]]:
    """Begin and end of as few pieces as fit, all of about one size: a last piece of three tokens would teach nothing."""
    count = -(-length // most)
    edges = [length * number // count for number in range(count + 1)]
    yield from pairwise(edges)


def _said_once(remarks: dict[str, list[str]]) -> list[str]:
    lines = []
    for remark, names in remarks.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        lines.append(f"{len(names):,} row{'s' if len(names) > 1 else ''}: {remark} ({', '.join(names[:3])}{more}).")
    return lines
