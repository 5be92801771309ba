"""What becomes of a caption on its way into a batch: trigger word, shuffled parts, dropout.

Everything follows from (seed, example, epoch) by hashing, so it needs no state, survives resuming, and the finite set of
texts a run can ask for is known ahead and can be encoded and cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_scripts.config import RunConfig

__all__ = ["CaptionSettings", "fraction", "shuffled", "with_trigger"]


def fraction(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts' text alone: the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger word in front, unless it already holds it as a word of its own."""
    if not trigger or trigger.lower() in (part.strip().lower() for part in caption.replace(",", " , ").split(",")):
        return caption
    if f" {trigger.lower()} " in f" {caption.lower().replace(',', ' ')} ":
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def shuffled(caption: str, separator: str, keep: int, *draw: object) -> str:
    """The caption with its parts in another order, the first `keep` in place; `draw` names the order."""
    parts = [part.strip() for part in caption.split(separator) if part.strip()]
    tail = sorted(enumerate(parts[keep:]), key=lambda item: fraction(*draw, item[0], item[1]))
    return f"{separator} ".join(parts[:keep] + [part for _, part in tail])


@dataclass(frozen=True)
class CaptionSettings:
    """The part of a run's settings that decides which text an example is trained with."""

    shuffle: bool
    separator: str
    keep: int
    dropout: float
    variants: int | None
    """How many orders of a caption exist; None for a new one in every epoch."""
    seed: int
    several: bool = True
    """Whether one of a picture's captions is drawn for each use; else it is always the first."""

    @classmethod
    def of(cls, config: RunConfig) -> CaptionSettings:
        return cls(
            shuffle=config.caption_shuffle,
            separator=config.caption_separator,
            keep=config.caption_keep,
            dropout=config.caption_dropout,
            variants=None if config.train_text_encoder else config.caption_variants,
            seed=config.seed,
        )

    def pick(self, captions: Sequence[str], key: str) -> str:
        """The text for one use of an example with these captions; `key` names the use."""
        if self.dropout and fraction(self.seed, "caption dropout", key) < self.dropout:
            return ""
        place = int(fraction(self.seed, "caption", key) * len(captions)) if self.several and len(captions) > 1 else 0
        caption = captions[place]
        if not self.shuffle:
            return caption
        order = key if self.variants is None else int(fraction(self.seed, "caption order", key) * self.variants)
        return shuffled(caption, self.separator, self.keep, self.seed, order)

    def possible(self, captions: Iterable[str]) -> list[str]:
        """Every text that `pick` can return, each once, in a stable order; only asked for when they are finitely many."""
        assert self.variants is not None or not self.shuffle
        texts: dict[str, None] = {}
        for caption in captions:
            if self.shuffle and self.variants is not None:
                for order in range(self.variants):
                    texts[shuffled(caption, self.separator, self.keep, self.seed, order)] = None
            else:
                texts[caption] = None
        if self.dropout:
            texts[""] = None
        return list(texts)
