"""Saved steps by the pictures they render: how much like the training set they look, and whether they show their prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

from lora_scripts.choosing.likeness import FEWEST_PICTURES, Likeness, Reference
from lora_scripts.choosing.rule import Measure
from lora_scripts.errors import DataError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from PIL.Image import Image

    from lora_scripts.choosing.clip import Embedder
    from lora_scripts.choosing.plan import Comparison
    from lora_scripts.data.dataset import Example
    from lora_scripts.families.protocol import SampleRequest

__all__ = ["SMALLEST_TRUST", "Studio", "picture_measure", "reference_of"]

NOTABLE_SPREADS = 0.5
"""Half a standard deviation, the usual line of a medium effect (Cohen 1988)."""
SMALLEST_TRUST = 0.1
"""A CLIP that is trusted less than this is not asked: its say would not be worth the rendering."""
MOST_REFERENCES = 48
"""Training pictures that CLIP looks at; more do not move their mean by anything that matters."""


class Studio(Protocol):
    """Renders saved steps."""

    def visit(self, step: int) -> AbstractContextManager[bool]:
        """The model as it was after that step, for a while; false when its checkpoint is damaged."""
        ...

    def render(self, requests: Sequence[SampleRequest]) -> list[Image]:
        """Pictures of the model as it is; several at once cost less."""
        ...

    def kept(self, step: int, number: int) -> Image | None:
        """The picture of the `number`-th preview request that the run rendered at that step, where it is still there."""
        ...


def reference_of(examples: Sequence[Example], embedder: Embedder) -> Reference | None:
    """The training pictures as they trained; None where too few can be read to learn anything from them."""
    from lora_scripts.data.buckets import fit_image
    from lora_scripts.data.images import read_image

    number = min(len(examples), MOST_REFERENCES)
    images, captions, names = [], [], []
    for example in (examples[i * len(examples) // number] for i in range(number)):
        try:
            images.append(fit_image(read_image(example.path), example.fit))
            captions.append(example.caption)
            names.append(example.name)
        except DataError:
            continue  # removed or damaged since it was encoded
    if len(set(captions)) < FEWEST_PICTURES:
        return None
    return Reference(embedder.images(images), embedder.texts(captions), captions, names)


def picture_measure(
    comparison: Comparison,
    reference: Reference,
    embedder: Embedder,
    studio: Studio,
    progress: Callable[[int, int], None],
) -> Measure:
    """Renders what is missing at every step of the comparison and measures it; damaged checkpoints are left out."""
    prompts = [request.prompt for request in comparison.requests]
    texts = embedder.texts(prompts)
    found: dict[int, Likeness] = {}
    for place, step in enumerate(comparison.steps):
        progress(place, len(comparison.steps))
        with studio.visit(step) as there:
            if there:
                found[step] = reference.measure(embedder.images(_pictures(comparison, step, studio)), texts, prompts)
    progress(len(comparison.steps), len(comparison.steps))
    trust = reference.trust
    return Measure(
        "pictures",
        {step: [a + b for a, b in zip(each.look, each.prompt, strict=True)] for step, each in found.items()},
        notable=NOTABLE_SPREADS,
        weight=trust.weight,
        shown={
            step: [("look", f"{fmean(each.look):+.2f}"), ("prompt", f"{fmean(each.prompt):+.2f}")]
            for step, each in found.items()
        },
        about=(
            f"Pictures: {len(prompts)} per step, compared with the training pictures (look) and with what they were asked for "
            f"(prompt) by {embedder.name}, in spreads of the training pictures; it tells {trust.hits:.0%} of this set's "
            f"captions from one another, so its word counts {trust.weight:.2f}."
        ),
    )


def _pictures(comparison: Comparison, step: int, studio: Studio) -> list[Image]:
    """A picture of every request; previews that the run has rendered already are not rendered again."""
    kept = {number: image for number in range(len(comparison.previews)) if (image := studio.kept(step, number))}
    missing = [number for number in range(len(comparison.requests)) if number not in kept]
    rendered = studio.render([comparison.requests[number] for number in missing]) if missing else []
    images = kept | dict(zip(missing, rendered, strict=True))
    return [images[number] for number in range(len(comparison.requests))]


def kept_preview(folder: Path, settings: Mapping[str, Any], step: int, number: int, prompt: str) -> Image | None:
    """A preview that this run has written to `folder`, exactly as rendered; None when it is missing or of another request."""
    from PIL import Image, UnidentifiedImageError

    from lora_scripts.training.record import sample_infotext, sample_name

    try:
        with Image.open(folder / sample_name(step, number + 1)) as image:
            same = image.info.get("parameters") == sample_infotext(settings, prompt, number, image.size)
            return image.convert("RGB") if same else None
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
        return None
