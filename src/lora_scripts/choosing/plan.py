"""Which saved steps are compared by pictures, and which pictures are rendered for it, within a share of the run's time.

Everything here follows from the config, the data set and the checkpoints, never from a clock: a run that was killed and
resumed compares the same pictures and makes the same choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_scripts.families.protocol import SampleRequest
from lora_scripts.training.validation import FORWARD_SHARE

__all__ = ["LARGEST_SHARE", "Comparison", "plan_comparison", "regular_steps"]

LARGEST_SHARE = 0.05
"""Of the run's time, for all pictures that are rendered for the choice alone."""
FEW_STEPS = 10
"""Denoising steps of such a picture at most: enough for CLIP, which sees it at about 224 pixels."""
DECODE_FORWARDS = 4.0
"""Time of decoding a picture, in forward passes of the denoiser at the same size."""
FEWEST, ENOUGH, MOST = 4, 8, 16
"""Pictures per step: below the first their noise hides any difference; steps are left out to reach the second."""
OWN_SEED = 1_000
"""Added to `sample_seed`: other noise than that of the previews, so that a prompt may be rendered again."""


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        steps: saved steps, the last one among them; empty when no comparison is worth its noise.
        previews: requests that the run has rendered at each of these steps anyway.
        extra: requests to render at each of these steps.
        share: of the run's time that rendering takes, estimated.
    """

    steps: Sequence[int]
    previews: Sequence[SampleRequest] = ()
    extra: Sequence[SampleRequest] = ()
    share: float = 0.0

    @property
    def requests(self) -> list[SampleRequest]:
        return [*self.previews, *self.extra]


def regular_steps(saved: Collection[int], save_every: int, last: int) -> list[int]:
    """The saved steps that every run of this config saves: without those where this one was stopped by hand."""
    return sorted(step for step in saved if step % save_every == 0 or step == last)


def plan_comparison(
    saved: Sequence[int],
    losses: Mapping[int, float],
    previews: Sequence[SampleRequest],
    preview_every: int,
    model: SampleRequest,
    captions: Sequence[str],
    examples_trained: float,
) -> Comparison:
    """As many steps and pictures as the budget allows.

    Args:
        saved: the steps to choose from, ascending; the last one is what the others are compared with.
        losses: held-out loss by step where it was measured; if not all steps can be compared, the lowest are.
        previews: what the run renders every `preview_every` steps and at its end; 0 for never.
        model: a request with the settings of previews.
        captions: prompts for further pictures, the most telling first.
        examples_trained: of the whole run.
    """
    last = saved[-1]
    due = bool(preview_every) and all(step % preview_every == 0 or step == last for step in saved)
    free = list(previews)[:MOST] if due else []
    few_steps = min(model.steps, FEW_STEPS)
    cost = few_steps * (2 if model.guidance > 1 else 1) + DECODE_FORWARDS
    run = examples_trained / FORWARD_SHARE
    affordable = int(LARGEST_SHARE * run / cost)

    num_steps = _num_steps(len(saved), len(free), affordable)
    if num_steps < 2:
        return Comparison(())
    num_extra = min(affordable // num_steps, MOST - len(free))
    prompts = _prompts(captions, {request.prompt for request in free}, num_extra)
    extra = [
        replace(model, prompt=prompt, seed=model.seed + OWN_SEED + number, steps=few_steps)
        for number, prompt in enumerate(prompts)
    ]
    if len(free) + len(extra) < FEWEST:
        return Comparison(())
    steps = _rivals(saved[:-1], losses, num_steps - 1)
    return Comparison([*steps, last], free, extra, cost * num_steps * len(extra) / run)


def _num_steps(num_saved: int, num_free: int, affordable: int) -> int:
    """How many steps can be compared by enough pictures each, or at least by the fewest that tell anything; 0 if not two."""
    for wanted in (ENOUGH, FEWEST):
        missing = max(wanted - num_free, 0)
        number = min(num_saved, affordable // missing) if missing else num_saved
        if number >= 2:
            return number
    return 0


def _prompts(captions: Sequence[str], used: Collection[str], number: int) -> list[str]:
    """So many captions, new ones first; then all over again, with another seed each time."""
    fresh = [text for text in dict.fromkeys(captions) if text not in used]
    pool = [*fresh, *(text for text in dict.fromkeys(captions) if text in used)]
    return [pool[i % len(pool)] for i in range(number)] if pool else []


def _rivals(earlier: Sequence[int], losses: Mapping[int, float], number: int) -> list[int]:
    """So many earlier steps, ascending: those with the lowest held-out loss, else spread evenly over the run."""
    if number >= len(earlier):
        return list(earlier)
    if all(step in losses for step in earlier):
        return sorted(sorted(earlier, key=lambda step: losses[step])[:number])
    return [earlier[(2 * i + 1) * len(earlier) // (2 * number)] for i in range(number)]
