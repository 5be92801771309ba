"""Two words for one thing in the captions of one data set: the LoRA ties half of what it learns to each."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SideBySide", "find_spellings", "find_synonyms"]

GROUPS: tuple[tuple[str, ...], ...] = (
    ("photo", "photograph", "picture", "image", "snapshot"),
    ("drawing", "sketch"),
    ("painting", "artwork"),
    ("watercolour", "watercolor", "aquarelle"),
    ("girl", "woman", "lady", "female"),
    ("boy", "man", "guy", "male", "gentleman"),
    ("child", "kid"),
    ("baby", "infant", "toddler"),
    ("cat", "kitty", "feline"),
    ("dog", "doggy", "canine"),
    ("rabbit", "bunny"),
    ("car", "automobile"),
    ("bike", "bicycle"),
    ("plane", "airplane", "aeroplane", "aircraft"),
    ("sailboat", "sailing boat"),
    ("sofa", "couch"),
    ("tv", "television"),
    ("phone", "cellphone", "smartphone", "mobile phone"),
    ("glasses", "eyeglasses", "spectacles"),
    ("trousers", "pants"),
    ("sneakers", "trainers"),
    ("sea", "ocean"),
    ("forest", "woods"),
    ("rock", "stone"),
    ("grey", "gray"),
    ("colour", "color"),
    ("blonde", "blond"),
    ("colourful", "colorful"),
)
FEWEST = 2
"""Captions that each of the words stands in alone: one odd wording is no habit."""
MOST_WORDS = 4
"""Parts of a caption up to this long are tags, which are compared as a whole; longer ones are sentences."""


@dataclass(frozen=True)
class SideBySide:
    """Words for one concept; `captions` maps each, the most frequent first, to the positions of the captions it is in."""

    captions: Mapping[str, Sequence[int]]

    @property
    def rarer(self) -> list[int]:
        """Captions that would have to change."""
        first, *others = self.captions
        return sorted({i for word in others for i in self.captions[word]} - set(self.captions[first]))


def find_synonyms(captions: Sequence[str]) -> list[SideBySide]:
    """Groups of which two or more words are each used instead of the others; plural forms count as their word."""
    plain = [f" {' '.join(_words(caption))} " for caption in captions]
    found: list[SideBySide] = []
    for group in GROUPS:
        users = {word: [i for i, text in enumerate(plain) if _holds(text, word)] for word in group}
        # A caption that holds two of the words means two things by them: "a man and a boy".
        uses = Counter(i for where in users.values() for i in where)
        alone = {word: [i for i in where if uses[i] == 1] for word, where in users.items()}
        _add(found, alone)
    return found


def find_spellings(captions: Sequence[str], separator: str) -> list[SideBySide]:
    """One word or tag written in several ways: t-shirt, tshirt, t shirt; as a tag also long sleeve, long sleeves.

    Upper and lower case count as the same, because CLIP's text encoders read everything in lower case. In sentences a
    plural is another number of things, so only whole tags are compared without their s.
    """
    ways: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for i, caption in enumerate(captions):
        words = _words(caption)
        for word in words:
            ways[word.replace("-", "")][word].add(i)
        for part in caption.lower().split(separator):
            tag = part.strip().split()
            if 0 < len(tag) <= MOST_WORDS:
                ways["tag " + " ".join(_singular(word.replace("-", "")) for word in tag)][" ".join(tag)].add(i)
    hyphenated = {key for key, written in ways.items() if any("-" in word for word in written)}
    for i, caption in enumerate(captions):
        words = _words(caption)
        for first, second in itertools.pairwise(words):
            if first + second in hyphenated:
                ways[first + second][f"{first} {second}"].add(i)
    found: list[SideBySide] = []
    for written in ways.values():
        _add(found, {word: sorted(where) for word, where in written.items()})
    return _without_repeats(found)


def _add(found: list[SideBySide], users: Mapping[str, Sequence[int]]) -> None:
    used = {word: where for word, where in users.items() if len(where) >= FEWEST}
    if len(used) > 1:
        found.append(SideBySide(dict(sorted(used.items(), key=lambda item: (-len(item[1]), item[0])))))


def _without_repeats(found: Sequence[SideBySide]) -> list[SideBySide]:
    """A word that is a tag by itself was found both ways."""
    return list({frozenset(item.captions): item for item in found}.values())


def _words(caption: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", caption.lower())


def _holds(text: str, word: str) -> bool:
    return f" {word} " in text or f" {word}s " in text


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
