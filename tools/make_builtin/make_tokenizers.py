"""Learns the small vocabularies: a byte-level BPE for mini-sd and mini-clip, WordPiece for mini-blip.

Both come from the captions of the world, the names of its styles and a list of words that people write in prompts. No
other text is read, so the result is the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from scenes import DEFAULT_WORK, world

START, END = "<|startoftext|>", "<|endoftext|>"
BPE_SIZE = 1400

_WORDS_OF_PROMPTS = """
a an the of in on at by with and or to for from near under over behind beside between into is are there here it its this
that one two three four five many several some few no not very small big large little tiny huge old new young
picture image photo photograph painting drawing illustration sketch print poster art artwork style styled scene view
portrait landscape background foreground close up closeup wide angle simple detailed highly masterpiece best quality
worst low high resolution sharp focus blurry bad ugly deformed watermark text signature cropped
ink wash sumi brush paper line lines lineart outline neon glow glowing cyberpunk night city blueprint technical plan grid
pixel pixelated bit retro game watercolour watercolor soft pastel wet woodcut linocut engraving carved black white
oil acrylic gouache pencil charcoal crayon comic cartoon manga anime flat vector sticker logo icon minimal abstract
vintage modern fantasy dark bright light shadow colourful colorful monochrome sepia grey gray brown gold silver cyan
magenta red orange yellow green blue purple pink trigger token person man woman boy girl child dog horse house tree
flower sun moon star stars cloud clouds rain snow fog storm wind sunset sunrise dawn dusk day daylight evening morning
beach sea ocean sand forest wood woods street town road desert dune mountain mountains hill valley meadow grass field
lake river water sky shown showing seen see we can be holding standing sitting flying running sailing parked swimming
sks ohwx zwx my mystyle
"""
COMMON_WORDS = tuple(_WORDS_OF_PROMPTS.split())

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"-_()/<>|+*&%$#@=[]{}~^`\\"


def byte_symbols() -> dict[int, str]:
    """A printable character for each byte, as in GPT-2 and CLIP (openai/CLIP, simple_tokenizer.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in symbols:
            symbols[b] = chr(256 + len(symbols) - len(printable))
    return symbols


def sample_captions(count: int, seed: int = 0) -> list[str]:
    """Captions in random wording, a third of them naming a style."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        style = world.STYLES[int(rng.integers(len(world.STYLES)))] if i % 3 == 0 else None
        out.append(world.caption(world.random_scene(rng, "any"), rng, style))
    return out


def word_counts(captions: list[str]) -> Counter[str]:
    """How often each word stands in the captions, plus 30 for each word people write in prompts."""
    counts: Counter[str] = Counter(w for c in captions for w in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", c.lower()))
    for word in COMMON_WORDS:
        counts[word] += 30
    return counts


def learn_bpe(counts: Counter[str], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The vocabulary in CLIP's order and its merges, most frequent pair first, ties by spelling."""
    letters = byte_symbols()
    ordered = [letters[b] for b in sorted(letters, key=lambda b: (len(letters[b].encode()) > 1, b))]
    vocabulary = [*ordered, *(s + "</w>" for s in ordered)]
    words = {(*w[:-1], w[-1] + "</w>"): n for w, n in counts.items() if w.isascii()}
    merges: list[tuple[str, str]] = []
    while len(vocabulary) < size - 2:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        vocabulary.append("".join(best))
        joined = {}
        for word, n in words.items():
            out: list[str] = []
            for symbol in word:
                if out and (out[-1], symbol) == best:
                    out[-1] += symbol
                else:
                    out.append(symbol)
            joined[tuple(out)] = joined.get(tuple(out), 0) + n
        words = joined
    return [*dict.fromkeys(vocabulary), START, END], merges


def write_clip_tokenizer(folder: Path, captions: list[str]) -> None:
    """Writes vocab.json, merges.txt and the two settings files of a CLIPTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = learn_bpe(word_counts(captions), BPE_SIZE)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_bert_tokenizer(folder: Path, captions: list[str]) -> None:
    """Writes vocab.txt and tokenizer_config.json of a BertTokenizer with BLIP's [DEC] and [ENC] marks."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = word_counts(captions)
    whole = [w for w in sorted(counts, key=lambda w: (-counts[w], w)) if w.isalpha()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    pieces = [*CHARACTERS, *("##" + c for c in CHARACTERS if c.isalnum())]
    vocabulary = list(dict.fromkeys([*special, *pieces, *whole]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = {
        "do_lower_case": True,
        "model_max_length": 64,
        "tokenizer_class": "BertTokenizer",
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "bos_token": "[DEC]",
        "additional_special_tokens": ["[ENC]"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Writes tokenizer-clip/ and tokenizer-blip/ under the work folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    given = parser.parse_args()
    captions = sample_captions(12_000)
    write_clip_tokenizer(given.work / "tokenizer-clip", captions)
    write_bert_tokenizer(given.work / "tokenizer-blip", captions)
    from transformers import BertTokenizer, CLIPTokenizer

    clip = CLIPTokenizer.from_pretrained(given.work / "tokenizer-clip")
    bert = BertTokenizer.from_pretrained(given.work / "tokenizer-blip")
    lengths = [len(clip(c).input_ids) for c in captions[:300]]
    print(f"CLIP: {len(clip)} entries, captions of {min(lengths)} to {max(lengths)} tokens")
    print(f"BERT: {len(bert)} entries; {bert.convert_ids_to_tokens(bert(captions[0]).input_ids)}")


if __name__ == "__main__":
    main()
