"""Findings about regularization pictures: what is to be learnt among them, the trigger word, how often they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_scripts.config import RunConfig
from lora_scripts.data.captions import with_trigger
from lora_scripts.data.dataset import Example
from lora_scripts.data.sampler import total_uses
from lora_scripts.preflight.findings import Finding
from lora_scripts.preflight.gather import DataFacts
from lora_scripts.preflight.likeness import near_duplicates
from lora_scripts.preflight.wording import count

__all__ = ["check_regularization"]


def check_regularization(facts: DataFacts, config: RunConfig) -> list[Finding]:
    """All findings about them; none where there are no such pictures."""
    others = [example for example in facts.examples if example.is_regularization]
    if not others or not facts.learnt:
        return []
    return [*_in_both(facts, others), *_with_trigger(others, config), *_share(facts.learnt, others)]


def _in_both(facts: DataFacts, others: Sequence[Example]) -> Iterable[Finding]:
    digests = {example.digest: example.name for example in facts.learnt}
    same = {each.name: f"the same file as {digests[each.digest]}" for each in others if each.digest in digests}
    single = [*facts.learnt, *(each for each in others if each.name not in same)]
    measured = [facts.pictures[example.name] for example in single]
    for group in near_duplicates([each.hash for each in measured], [each.copy for each in measured]):
        learnt = [single[i].name for i in group if not single[i].is_regularization]
        if learnt:
            same |= {single[i].name: f"nearly {learnt[0]}" for i in group if single[i].is_regularization}
    if same:
        yield Finding(
            "amber",
            "regularization-copies",
            f"{count(len(same), 'regularization picture')} {'is' if len(same) == 1 else 'are'} also among those that are to be learnt, "
            "with and without the trigger word.",
            list(same),
            "Take them out of the regularization folder: its pictures show other things of the same kind.",
            same,
        )


def _with_trigger(others: Sequence[Example], config: RunConfig) -> Iterable[Finding]:
    named = [
        each.name
        for each in others
        if any(with_trigger(each.caption, word) == each.caption for word in config.triggers)
    ]
    if named:
        yield Finding(
            "amber",
            "regularization-trigger",
            f"{count(len(named), 'caption')} of regularization pictures hold the trigger word, so it is taught to mean them as well.",
            named,
            "Take it out of those captions.",
        )


def _share(learnt: Sequence[Example], others: Sequence[Example]) -> Iterable[Finding]:
    uses = total_uses(learnt)
    listed = sum(each.repeats for each in others)
    how = f"each is seen about {uses / listed:.2g} times an epoch"
    if listed > uses:
        how = f"an epoch takes {uses} of them, the next one goes on with the others"
    yield Finding(
        "note",
        "regularization",
        f"{count(len(others), 'regularization picture')} for {uses} uses of the others: {how}.",
    )
