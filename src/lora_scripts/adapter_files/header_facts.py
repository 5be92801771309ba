"""What a file's header tells people: the base model, the trigger, what it was trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["HeaderFacts", "header_facts"]

_MOST_TAGS = 5


@dataclass(frozen=True)
class HeaderFacts:
    """Texts are empty and numbers None where the header does not say.

    Attributes:
        trigger: the words that call it up, as the trainer wrote them.
        tags: the most frequent words of the captions: the trigger is often the first of them.
    """

    title: str = ""
    base_model: str = ""
    trigger: str = ""
    tags: tuple[str, ...] = ()
    steps: int | None = None
    epochs: int | None = None
    pictures: int | None = None
    resolution: str = ""
    trainer: str = ""
    date: str = ""


def header_facts(metadata: Mapping[str, str]) -> HeaderFacts:
    """The facts in a header; what does not look as expected is passed over."""

    def text(*keys: str) -> str:
        found = (metadata.get(key, "").strip() for key in keys)
        return next((value for value in found if value and value != "None"), "")

    base = text("ss_sd_model_name", "modelspec.base_model")
    version = text("ss_base_model_version")
    digits = text("ss_sd_model_hash")
    known = ", ".join(part for part in (version, f"hash {digits}" if digits else "") if part)
    return HeaderFacts(
        title=text("modelspec.title", "ss_output_name"),
        base_model=f"{base} ({known})" if base and known else base or version,
        trigger=text("modelspec.trigger_phrase", "ss_trigger_word", "trigger_word"),
        tags=_tags(metadata.get("ss_tag_frequency", "")),
        steps=_whole(text("ss_steps")),
        epochs=_whole(text("ss_epoch")),
        pictures=_whole(text("ss_num_train_images")),
        resolution=text("ss_resolution", "modelspec.resolution").strip("()").replace(", ", "x"),
        trainer=text("ss_network_module", "modelspec.implementation", "software"),
        date=text("modelspec.date")[:10],
    )


def _whole(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _tags(text: str) -> tuple[str, ...]:
    """The most frequent tags over all folders."""
    try:
        folders = json.loads(text) if text else {}
    except ValueError:
        return ()
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        if isinstance(tags, dict):
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items() if isinstance(count, int)})
    return tuple(tag for tag, _ in counts.most_common(_MOST_TAGS))
