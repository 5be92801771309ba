"""Findings about captions: missing, alike, cut by the text encoder, without the trigger word, inconsistent."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from lora_scripts.config import RunConfig
from lora_scripts.data.captions import with_trigger
from lora_scripts.data.dataset import Example
from lora_scripts.data.folders import source_of
from lora_scripts.preflight.findings import Finding
from lora_scripts.preflight.gather import DataFacts
from lora_scripts.preflight.synonyms import SideBySide, find_spellings, find_synonyms
from lora_scripts.preflight.wording import count

__all__ = ["CutCaption", "check_captions"]

CutCaption = Callable[[str], str]
"""The part of a caption that the text encoder reads, as `ModelFamily.cut_caption`."""

MOST_MISSING = 0.5
MOST_SHARED = 0.5
"""Share of pictures whose caption is another one's too; some repetition is normal among plain motifs."""
USUAL_START = 0.8
"""Share of captions that begin alike from which the beginning is a trigger word that the others lack."""
FEWEST_CAPTIONS = 5
"""Below this many, habits cannot be told from chance."""


def check_captions(facts: DataFacts, config: RunConfig, cut: CutCaption | None) -> list[Finding]:
    """All findings about captions; `cut` None leaves the token limit out."""
    learnt = facts.learnt
    return [
        *_missing(facts),
        *_alike(learnt),
        *_too_long(facts.examples, cut),
        *_trigger(facts, config),
        *_inconsistent(learnt, config.caption_separator),
    ]


def _missing(facts: DataFacts) -> Iterable[Finding]:
    empty = [example.name for example in facts.examples if not example.caption]
    missing = [*facts.without_caption, *empty]
    if not missing:
        return
    total, folder = facts.num_pictures, source_of(missing[0], facts.sources)
    table = folder.metadata_path or folder.path / "metadata.csv"
    how = [
        f"{len(facts.without_caption)} of them would not train" if facts.without_caption else "",
        f"{len(empty)} of them would train without words" if empty else "",
    ]
    yield Finding(
        "red" if len(missing) > MOST_MISSING * total else "amber",
        "captions-missing",
        f"{len(missing)} of {count(total, 'picture')} {'has' if len(missing) == 1 else 'have'} no caption; {' and '.join(filter(None, how))}.",
        missing,
        f"Write them with: lora-scripts label --input {folder.path} --output {table}",
    )


def _alike(examples: Sequence[Example]) -> Iterable[Finding]:
    names: dict[str, list[str]] = defaultdict(list)
    for example in examples:
        if example.caption:
            names[example.caption].append(example.name)
    shared = [name for group in names.values() if len(group) > 1 for name in group]
    if len(names) == 1 and len(shared) >= FEWEST_CAPTIONS:
        yield Finding(
            "amber",
            "captions-all-same",
            "All captions are the same, so a prompt will steer nothing but the whole look.",
            shared,
            "Describe what differs from picture to picture, unless this is meant.",
        )
    elif shared:
        many = len(shared) > MOST_SHARED * len(examples)
        most = max(names, key=lambda caption: len(names[caption]))
        yield Finding(
            "amber" if many else "note",
            "captions-duplicate",
            f"{count(len(shared), 'picture')} share a caption with another one, most often {_short(most)} ({len(names[most])} times).",
            shared,
            "Describe what differs between them." if many else "",
        )


def _too_long(examples: Sequence[Example], cut: CutCaption | None) -> Iterable[Finding]:
    if cut is None:
        return
    lost = {}
    for example in examples:
        cuts = ((caption, cut(caption)) for caption in example.captions)
        if beyond := next((caption[len(kept) :] for caption, kept in cuts if kept != caption), ""):
            lost[example.name] = f"not read: {_short(beyond.strip())}"
    if lost:
        yield Finding(
            "amber",
            "captions-too-long",
            f"{count(len(lost), 'caption')} {'is' if len(lost) == 1 else 'are'} longer than the text encoder reads.",
            list(lost),
            "Shorten them, or move what matters to the front.",
            lost,
        )


def _trigger(facts: DataFacts, config: RunConfig) -> Iterable[Finding]:
    if triggers := config.triggers:
        named = " or ".join(map(repr, triggers))
        without = [
            prompt for prompt in config.sample_prompts if all(with_trigger(prompt, word) != prompt for word in triggers)
        ]
        if without:
            yield Finding(
                "amber",
                "trigger-not-in-previews",
                f"{count(len(without), 'sample prompt')} lack the trigger word {named}, so previews will hardly show the LoRA.",
                remedy=f"Begin them with {' or '.join(triggers)}, in sample_prompts.",
            )
        added = sum(e.caption != facts.written.get(e.name, "") for e in facts.examples)
        if added:
            yield Finding(
                "note", "trigger-added", f"The trigger word {named} is put in front of {count(added, 'caption')}."
            )
        return
    starts = {e.name: e.caption.split(config.caption_separator)[0].strip().lower() for e in facts.learnt if e.caption}
    if len(starts) < FEWEST_CAPTIONS:
        return
    start, times = Counter(starts.values()).most_common(1)[0]
    parts = {e.name: [part.strip().lower() for part in e.caption.split(config.caption_separator)] for e in facts.learnt}
    lacking = [name for name in starts if start not in parts[name]]
    if lacking and times >= USUAL_START * len(starts):
        yield Finding(
            "amber",
            "trigger-missing",
            f"{times} of {len(starts)} captions begin with {start!r}; {len(lacking)} {'lacks' if len(lacking) == 1 else 'lack'} it.",
            lacking,
            f"If it is the trigger word, set trigger_word: {start}; it is then added where it is missing.",
        )


def _inconsistent(examples: Sequence[Example], separator: str) -> Iterable[Finding]:
    captions = [example.caption for example in examples]
    for code, what, found in (
        ("synonyms", "Several words stand for one thing", find_synonyms(captions)),
        ("spellings", "One word is written in several ways", find_spellings(captions, separator)),
    ):
        if found:
            named = sorted({examples[i].name for group in found for i in group.rarer})
            shown = "; ".join(_beside(group) for group in found[:4])
            more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
            yield Finding(
                "amber",
                code,
                f"{what}: {shown}{more}.",
                named,
                "Use one of them everywhere, if they mean the same: what is learnt is then not divided between them.",
            )


def _beside(group: SideBySide) -> str:
    return " / ".join(f"{word} ({len(where)})" for word, where in group.captions.items())


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")
