"""Findings about the pictures themselves: unreadable, copies, too small, soft, dark, framed, marked, cropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from lora_scripts.data.dataset import Example
from lora_scripts.preflight.borders import common_marks
from lora_scripts.preflight.findings import Finding
from lora_scripts.preflight.gather import DataFacts
from lora_scripts.preflight.likeness import near_duplicates
from lora_scripts.preflight.picture_facts import PictureFacts
from lora_scripts.preflight.wording import count

__all__ = ["check_pictures"]

MOST_UNREADABLE = 0.1
FEWEST_UNREADABLE = 3
"""Below this many, an unreadable picture is an accident whatever its share of a small folder."""
MOST_ENLARGED = 1.25
"""Enlarging by up to a quarter is hardly seen; those pictures are named all the same."""
MOST_CROPPED = 0.3
"""Share of a picture's area; 4:3 made square loses a quarter, 3:2 a third. Beyond it heads and hands are cut."""
SOFT = 0.015
"""Sharpness below this is blurred. Photographs blurred by 2 pixels of 512 measure 0.017 to 0.018, by 4 pixels 0.012 to
0.015; sharp photographs 0.4 and more, the softest drawn watercolours 0.02."""
DARK = 50.0
"""Grey level that not even the brightest 1 % of the pixels exceed; drawn night scenes reach 120 and more."""
FLAT = 4.0
"""Spread of grey levels; a picture below it is one even colour."""


def check_pictures(facts: DataFacts) -> list[Finding]:
    """All findings about pictures, from their measurements alone."""
    measured = [(example, facts.pictures[example.name]) for example in facts.examples]
    learnt = [pair for pair in measured if not pair[0].is_regularization]
    return [
        *_unreadable(facts),
        *_copies(learnt),
        *_too_small(facts.examples),
        *_cropped(facts.examples),
        *_soft_or_empty(measured),
        *_framed(measured),
        *_marked(learnt),
    ]


def _unreadable(facts: DataFacts) -> Iterable[Finding]:
    if not facts.learnt:
        yield Finding(
            "red",
            "no-pictures",
            "No picture can be trained on.",
            remedy="Put readable pictures with captions into the folder; the reasons stand below.",
        )
    bad = facts.unreadable
    if bad:
        many = len(bad) >= FEWEST_UNREADABLE and len(bad) > MOST_UNREADABLE * facts.num_pictures
        yield Finding(
            "red" if many else "amber",
            "unreadable",
            f"{len(bad)} of {count(facts.num_pictures, 'picture')} cannot be read and would not train.",
            [item.name for item in bad],
            "Was a copy or download cut off? Copy them again, or leave them out with exclude.",
            {item.name: item.reason for item in bad},
        )


def _copies(measured: Sequence[tuple[Example, PictureFacts]]) -> Iterable[Finding]:
    same: dict[str, list[str]] = defaultdict(list)
    for example, _ in measured:
        same[example.digest].append(example.name)
    groups = [names for names in same.values() if len(names) > 1]
    if groups:
        yield _group_finding("exact-duplicates", "the same file as", groups)
    # One of each set of equal files goes on: what is equal needs no second finding.
    single = [pair for pair in measured if same[pair[0].digest][0] == pair[0].name]
    near = near_duplicates([facts.hash for _, facts in single], [facts.copy for _, facts in single])
    groups = [[single[i][0].name for i in group] for group in near]
    if groups:
        yield _group_finding("near-duplicates", "nearly the same as", groups)


def _group_finding(code: str, how: str, groups: Sequence[Sequence[str]]) -> Finding:
    details = {name: f"{how} {group[0]}" for group in groups for name in group[1:]}
    return Finding(
        "amber",
        code,
        f"{count(len(details), 'picture')} {'is' if len(details) == 1 else 'are'} {how} another one, so that one weighs more.",
        list(details),
        "Keep the best of each, unless the weight is meant (then repeats says it better).",
        details,
    )


def _too_small(examples: Sequence[Example]) -> Iterable[Finding]:
    enlarged = {
        e.name: f"{e.size[0]}x{e.size[1]}, enlarged to {e.fit.scaled[0]}x{e.fit.scaled[1]}"
        for e in examples
        if e.fit.upscales(e.size)
    }
    small = {e.name: enlarged[e.name] for e in examples if e.fit.scaled[0] > MOST_ENLARGED * e.size[0]}
    slightly = {name: how for name, how in enlarged.items() if name not in small}
    if slightly:
        yield Finding(
            "note",
            "enlarged",
            f"{count(len(slightly), 'picture')} {'is' if len(slightly) == 1 else 'are'} enlarged a little to fit.",
            list(slightly),
            details=slightly,
        )
    if small:
        yield Finding(
            "amber",
            "too-small",
            f"{count(len(small), 'picture')} must be enlarged to fit, so the LoRA learns their blur.",
            list(small),
            "Use larger originals, a smaller resolution, or upscale: false to leave them out.",
            small,
        )


def _cropped(examples: Sequence[Example]) -> Iterable[Finding]:
    cut = {
        e.name: f"{e.size[0]}x{e.size[1]}, {e.fit.cropped_share:.0%} is cut off"
        for e in examples
        if e.fit.cropped_share > MOST_CROPPED
    }
    if cut:
        yield Finding(
            "amber",
            "cropped",
            f"{count(len(cut), 'picture')} would lose more than {MOST_CROPPED:.0%} of their area to the crop around the middle.",
            list(cut),
            "Crop them yourself around what matters, set buckets: true, or raise max_aspect.",
            cut,
        )


def _soft_or_empty(measured: Sequence[tuple[Example, PictureFacts]]) -> Iterable[Finding]:
    flat = [example.name for example, facts in measured if facts.spread < FLAT]
    dark = [e.name for e, facts in measured if facts.brightest < DARK and e.name not in flat]
    soft = [
        e.name
        for e, facts in measured
        if facts.sharpness is not None and facts.sharpness < SOFT and e.name not in {*flat, *dark}
    ]
    if flat:
        yield Finding(
            "amber",
            "flat",
            f"{count(len(flat), 'picture')} {'is' if len(flat) == 1 else 'are'} of one even colour.",
            flat,
            "Leave them out with exclude; there is nothing to learn from them.",
        )
    if dark:
        yield Finding(
            "amber",
            "dark",
            f"{count(len(dark), 'picture')} {'is' if len(dark) == 1 else 'are'} almost black.",
            dark,
            "Brighten them or leave them out, unless darkness is the style (then noise_offset: 0.05 helps).",
        )
    if soft:
        yield Finding(
            "amber",
            "blurred",
            f"{count(len(soft), 'picture')} {'has' if len(soft) == 1 else 'have'} no sharp edge anywhere.",
            soft,
            "Replace them by sharper ones, unless softness is the style.",
        )


def _framed(measured: Sequence[tuple[Example, PictureFacts]]) -> Iterable[Finding]:
    framed: dict[str, str] = {}
    for example, facts in measured:
        across, down = facts.bars
        if across or down:
            where = "all around" if across and down else "left and right" if across else "top and bottom"
            framed[example.name] = f"{1 - (1 - across) * (1 - down):.0%} of it, {where}"
    if framed:
        yield Finding(
            "amber",
            "bars",
            f"{count(len(framed), 'picture')} {'has' if len(framed) == 1 else 'have'} bars or a frame of one colour, which would be learnt.",
            list(framed),
            "Crop the bars away.",
            framed,
        )


def _marked(measured: Sequence[tuple[Example, PictureFacts]]) -> Iterable[Finding]:
    marks: Mapping[str, Sequence[int]] = common_marks([facts.patches for _, facts in measured])
    if marks:
        # A long mark reaches from one place into the next.
        carriers = sorted({i for positions in marks.values() for i in positions})
        yield Finding(
            "amber",
            "common-mark",
            f"{len(carriers)} pictures show the same mark in the {' and '.join(marks)}: a watermark, logo, date or signature would be learnt.",
            [measured[i][0].name for i in carriers],
            "Crop or paint it away, unless it belongs to the style.",
        )
