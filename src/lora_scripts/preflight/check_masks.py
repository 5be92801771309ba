"""Findings about masks: missing, empty, of another shape than their picture, unreadable, without a picture."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from lora_scripts.config import RunConfig
from lora_scripts.preflight.findings import Finding
from lora_scripts.preflight.gather import DataFacts
from lora_scripts.preflight.wording import count

__all__ = ["check_masks"]

OTHER_SHAPE = 0.02
"""Difference of the aspects, as a share, from which a mask does not fit its picture; scaling alone rounds by less."""


def check_masks(facts: DataFacts, config: RunConfig) -> list[Finding]:
    """All findings about masks; none without `masked_loss`."""
    if config.masked_loss == "none":
        return []
    return [*_missing(facts, config), *_empty(facts, config), *_shapes(facts), *_unreadable(facts), *_unused(facts)]


def _missing(facts: DataFacts, config: RunConfig) -> Iterable[Finding]:
    missing = [example.name for example in facts.learnt if example.mask is None]
    if not missing:
        return
    what = "transparency" if config.masked_loss == "alpha" else "mask"
    none_at_all = len(missing) == len(facts.learnt)
    remedy = "Masks are named like their pictures: mask_dir/a.png for a.jpg, or a-masklabel.png beside it."
    yield Finding(
        "red" if none_at_all else "amber",
        "masks-missing",
        f"No picture has a {what}, so masked_loss has no effect."
        if none_at_all
        else f"{len(missing)} of {count(len(facts.learnt), 'picture')} {'has' if len(missing) == 1 else 'have'} no {what} and "
        f"{'is' if len(missing) == 1 else 'are'} learnt whole.",
        missing,
        remedy
        if config.masked_loss == "folder"
        else "Save them with transparency (PNG or WebP), or use masked_loss: folder.",
    )


def _empty(facts: DataFacts, config: RunConfig) -> Iterable[Finding]:
    empty = [name for name, share in facts.masks.items() if share == 0]
    if empty:
        outside = config.masked_weight_outside
        then = f"all of it counts {outside:g}" if outside else "it is left out"
        yield Finding(
            "red" if len(empty) == len(facts.learnt) else "amber",
            "masks-empty",
            f"{count(len(empty), 'mask')} {'leaves' if len(empty) == 1 else 'leave'} nothing of the picture to be learnt; {then}.",
            empty,
            "White is learnt, black is not: are they the wrong way round, or is what they show cropped away?",
        )


def _shapes(facts: DataFacts) -> Iterable[Finding]:
    other = {}
    for example in facts.examples:
        if example.mask is None:
            continue
        (width, height), (mask_width, mask_height) = example.size, example.mask.size
        stretch = Fraction(width * mask_height, height * mask_width)
        if abs(stretch - 1) > OTHER_SHAPE:
            other[example.name] = f"{width}x{height}, its mask {mask_width}x{mask_height}"
    if other:
        yield Finding(
            "red",
            "masks-shape",
            f"{count(len(other), 'mask')} {'has' if len(other) == 1 else 'have'} another shape than the picture, so other parts would be learnt.",
            list(other),
            "Make them from these very pictures, or take them out of mask_dir.",
            other,
        )


def _unreadable(facts: DataFacts) -> Iterable[Finding]:
    bad = facts.bad_masks
    if bad:
        yield Finding(
            "amber",
            "masks-unreadable",
            f"{count(len(bad), 'mask')} cannot be read; {'its picture does' if len(bad) == 1 else 'their pictures do'} not train.",
            [item.name for item in bad],
            "Save them again, or take them out of mask_dir.",
            {item.name: item.reason for item in bad},
        )


def _unused(facts: DataFacts) -> Iterable[Finding]:
    if facts.unused_masks:
        yield Finding(
            "note",
            "masks-unused",
            f"{count(len(facts.unused_masks), 'mask')} {'belongs' if len(facts.unused_masks) == 1 else 'belong'} to no picture.",
            list(facts.unused_masks),
            "A mask is named like its picture, in the same sub-folder.",
        )
