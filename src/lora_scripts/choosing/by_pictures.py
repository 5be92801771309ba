"""Compares saved steps by the pictures they render, where CLIP knows its way about the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lora_scripts.choosing.clip import Embedder
from lora_scripts.choosing.pictures import SMALLEST_TRUST, kept_preview, picture_measure, reference_of
from lora_scripts.choosing.plan import plan_comparison
from lora_scripts.choosing.rule import Measure
from lora_scripts.config import RunConfig, Size
from lora_scripts.previews import preview_request

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.captioners.folders import ModelFolder
    from lora_scripts.choosing.likeness import Reference
    from lora_scripts.data.dataset import Example
    from lora_scripts.families.protocol import SampleRequest
    from lora_scripts.previews import Previews
    from lora_scripts.tasks.protocol import Run
    from lora_scripts.training.resume import Resumable

__all__ = ["ByPictures"]


class ByPictures:
    """The comparison of a text-to-image run."""

    by = "pictures"

    def __init__(self, run: Run, clip: ModelFolder, run_state: Resumable, previews: Previews, resolution: Size) -> None:
        """Args:
        clip: compares pictures, as `choosing.clip.find_clip` gives it.
        """
        self._run, self._clip = run, clip
        self._run_state, self._previews, self._resolution = run_state, previews, resolution
        self.caption_hits: Mapping[str, float] = {}

    def measure(self, by_loss: Measure | None, saved: Sequence[int], last: int) -> Measure | None:
        """The comparison by pictures, where CLIP can be trusted on this set and the run is long enough to pay for it."""
        config, parts, plan = self._run.config, self._run.prepared.parts, self._run.plan
        train: Sequence[Example] = parts.train.dataset.learnt
        held_out = parts.held_out.examples if parts.held_out is not None else ()
        losses = {step: -sum(each) / len(each) for step, each in by_loss.values.items()} if by_loss is not None else {}
        comparison = plan_comparison(
            [step for step in saved if not losses or step in losses],
            losses,
            self._previews.requests,
            config.preview_every,
            preview_request(config, "", 0, self._resolution),
            [example.caption for example in (*held_out, *train)],
            self._run.max_steps * plan.uses_per_epoch / plan.steps_per_epoch,
        )
        if not comparison.steps:
            return None
        embedder = Embedder(self._clip, self._run.device)
        reference = reference_of(train, embedder)
        if reference is None or reference.trust.weight < SMALLEST_TRUST:
            self._run.events.note(f"Saved steps are not compared by their pictures: {_blind(embedder.name, reference)}")
            return None
        self.caption_hits = reference.caption_hits
        return picture_measure(
            comparison,
            reference,
            embedder,
            _Studio(config, self._run_state, self._previews, comparison.previews),
            lambda done, total: self._run.events.progress("comparing saved steps", done, total),
        )


def _blind(clip: str, reference: Reference | None) -> str:
    if reference is None:
        return "it takes at least four training pictures with captions that differ."
    return (
        f"{clip} does not know its way about this set, it tells {reference.trust.hits:.0%} of the captions from one another, "
        "and chance is 50 %. clip_model can name another one."
    )


class _Studio:
    """Renders saved steps with the run's own model; previews come from their files."""

    def __init__(
        self, config: RunConfig, run_state: Resumable, previews: Previews, requests: Sequence[SampleRequest]
    ) -> None:
        self._samples = config.output_dir / "samples"
        self._settings: dict[str, Any] = config.model_dump(mode="json")
        self._run_state, self._previews, self._requests = run_state, previews, requests

    def visit(self, step: int) -> AbstractContextManager[bool]:
        return self._run_state.visit(step)

    def render(self, requests: Sequence[SampleRequest]) -> list[Image]:
        return self._previews.pictures(requests)

    def kept(self, step: int, number: int) -> Image | None:
        return kept_preview(self._samples, self._settings, step, number, self._requests[number].prompt)
