"""Findings about shapes and steps: what a batch can be filled from, how long an epoch is, how often a picture is seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from lora_scripts.config import RunConfig, Size
from lora_scripts.data.dataset import Example
from lora_scripts.data.sampler import mean_uses, total_uses
from lora_scripts.preflight.findings import Finding
from lora_scripts.preflight.run_length import RunLength
from lora_scripts.preflight.wording import count, some

__all__ = ["check_shapes"]

MOST_LONELY = 0.3
"""Share of an epoch in shapes too small for a batch; below it the lost speed is not worth a word."""
MOST_UNEVEN = 10
"""Times that one picture is seen more often than another."""


def check_shapes(examples: Sequence[Example], config: RunConfig, length: RunLength) -> list[Finding]:
    """All findings about shapes, steps and repeats."""
    if not examples:
        return []
    return [
        *_never_filled(examples, config),
        *_lonely(examples, config),
        *_uneven(examples),
        *_steps(examples, config, length),
    ]


def _never_filled(examples: Sequence[Example], config: RunConfig) -> Iterable[Finding]:
    uses = total_uses(examples)
    if "batch_size" in config.model_fields_set and config.batch_size != "auto" and config.batch_size > uses:
        yield Finding(
            "red",
            "batch-never-filled",
            f"batch_size: {config.batch_size} is more than the {count(uses, 'picture')} of an epoch; the run refuses it.",
            remedy=f"Set batch_size: {uses} or less, or add pictures.",
        )


def _lonely(examples: Sequence[Example], config: RunConfig) -> Iterable[Finding]:
    uses: dict[Size, float] = defaultdict(float)
    for example, times in zip(examples, mean_uses(examples), strict=True):
        uses[example.fit.bucket] += times
    lonely = {bucket: n for bucket, n in uses.items() if n < config.micro_batch}
    if len(uses) > 1 and sum(lonely.values()) > MOST_LONELY * sum(uses.values()):
        shapes = [f"{w}x{h} ({n:.3g})" for (w, h), n in sorted(lonely.items(), key=lambda item: item[1])]
        yield Finding(
            "amber",
            "shapes-below-batch",
            f"{count(len(lonely), 'shape')} hold fewer pictures than a batch of {config.micro_batch}: {some(shapes, 5)}. "
            "No picture is lost, but passes are smaller and steps slower.",
            [example.name for example in examples if example.fit.bucket in lonely],
            "Crop pictures to common shapes, lower batch_size, or raise bucket_step so that there are fewer shapes.",
        )


def _uneven(examples: Sequence[Example]) -> Iterable[Finding]:
    examples = [example for example in examples if not example.is_regularization]
    repeats = [example.repeats for example in examples]
    if repeats and max(repeats) >= MOST_UNEVEN * min(repeats):
        rare = [example.name for example in examples if example.repeats == min(repeats)]
        yield Finding(
            "amber",
            "repeats-uneven",
            f"Some pictures are seen {max(repeats) // min(repeats)} times as often as others, because of the numbers in "
            "folder names or their own repeats.",
            rare,
            "Balance the repeats, unless this is meant.",
        )


def _steps(examples: Sequence[Example], config: RunConfig, length: RunLength) -> Iterable[Finding]:
    cut = f"{config.batch_size} x {config.gradient_accumulation_steps}"
    batch = cut if config.batch_size != "auto" and config.gradient_accumulation_steps > 1 else f"{config.step_size}"
    learnt = [example for example in examples if not example.is_regularization]
    per_picture = length.max_steps / length.steps_per_epoch * total_uses(learnt) / max(1, len(learnt))
    yield Finding(
        "note",
        "steps",
        f"{count(length.max_steps, 'step')} of batch {batch}, {length.steps_per_epoch} per epoch; "
        f"each picture is seen about {per_picture:.3g} times.",
    )
