"""Measures the saved steps of a complete run, applies the rule, and puts the chosen step back into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lora_scripts.choosing.clip import Embedder
from lora_scripts.choosing.held_out import held_out_measure
from lora_scripts.choosing.pictures import SMALLEST_TRUST, kept_preview, picture_measure, reference_of
from lora_scripts.choosing.plan import plan_comparison, regular_steps
from lora_scripts.choosing.rule import Choice, Measure, choose
from lora_scripts.config import RunConfig, Size
from lora_scripts.errors import LoraScriptsError
from lora_scripts.previews import preview_request
from lora_scripts.training.checkpoint import saved_steps
from lora_scripts.training.micro_batches import is_out_of_memory
from lora_scripts.training.ranking import read_validations

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from lora_scripts.captioners.folders import ModelFolder
    from lora_scripts.choosing.likeness import Reference
    from lora_scripts.data.split import Split
    from lora_scripts.families.protocol import SampleRequest
    from lora_scripts.previews import Previews
    from lora_scripts.training.events import Events
    from lora_scripts.training.loop import LoopState
    from lora_scripts.training.resume import Resumable

__all__ = ["Chooser"]


class Chooser:
    """Chooses among the saved steps when the run is complete, and puts the chosen one back into the model."""

    def __init__(
        self,
        config: RunConfig,
        clip: ModelFolder | None,
        parts: Split,
        examples_trained: float,
        run_state: Resumable,
        previews: Previews,
        resolution: Size,
        device: torch.device,
        events: Events,
    ) -> None:
        """Args:
        clip: compares pictures, as `choosing.clip.find_clip` gives it.
        examples_trained: of the whole run, over all its epochs.
        """
        self._config, self._clip, self._parts, self._examples_trained = config, clip, parts, examples_trained
        self._run_state, self._previews = run_state, previews
        self._resolution, self._device, self._events = resolution, device, events
        self.caption_hits: Mapping[str, float] = {}
        """Picture's name -> share of the other captions that its own beats by CLIP; known where CLIP could be trusted."""

    def put_best_back(self, state: LoopState) -> Choice:
        """Makes the model that of the best saved step, and says which it is and why."""
        if self._config.keep == "last":
            return Choice(state.step, "")
        last = state.step
        saved = regular_steps(saved_steps(self._config.output_dir), self._config.save_steps, last)
        measures = self._measures(state, saved, last)
        if not measures and not state.validations:
            return Choice(last, "")
        while True:
            choice = choose(measures, saved, last)
            if choice.step == last or self._run_state.put_back(choice.step):
                break
            saved.remove(choice.step)  # damaged since it was written: the next best
        self._events.note(choice.why)
        if choice.step != last:
            self._previews.repeat(choice.step)
        return choice

    def _measures(self, state: LoopState, saved: list[int], last: int) -> list[Measure]:
        if len(saved) < 2:
            return []
        by_loss = held_out_measure(read_validations(state), saved, last)
        measures = [by_loss] if by_loss is not None else []
        # A finished run is not lost because pictures of it cannot be compared.
        try:
            by_pictures = self._by_pictures(by_loss, saved, last)
        except LoraScriptsError as error:
            self._events.note(f"Saved steps are not compared by their pictures: {error}", "warning")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._events.note("Saved steps are not compared by their pictures: memory ran out.", "warning")
        else:
            measures += [by_pictures] if by_pictures is not None else []
        return measures

    def _by_pictures(self, by_loss: Measure | None, saved: list[int], last: int) -> Measure | None:
        """The comparison by pictures, where CLIP can be trusted on this set and the run is long enough to pay for it."""
        if self._clip is None:
            return None
        config, train, held_out = self._config, self._parts.train.dataset, self._parts.held_out
        captions = [example.caption for example in (*(held_out.dataset.examples if held_out else ()), *train.examples)]
        losses = {step: -sum(each) / len(each) for step, each in by_loss.values.items()} if by_loss is not None else {}
        comparison = plan_comparison(
            [step for step in saved if not losses or step in losses],
            losses,
            self._previews.requests,
            config.preview_every,
            preview_request(config, "", 0, self._resolution),
            captions,
            self._examples_trained,
        )
        if not comparison.steps:
            return None
        embedder = Embedder(self._clip, self._device)
        reference = reference_of(train.examples, embedder)
        if reference is None or reference.trust.weight < SMALLEST_TRUST:
            self._events.note(f"Saved steps are not compared by their pictures: {_blind(embedder.name, reference)}")
            return None
        self.caption_hits = reference.caption_hits
        return picture_measure(
            comparison,
            reference,
            embedder,
            _Studio(config, self._run_state, self._previews, comparison.previews),
            lambda done, total: self._events.progress("comparing saved steps", done, total),
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
