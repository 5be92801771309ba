"""Findings about time, memory and disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_scripts.config import RunConfig
from lora_scripts.planning.budget import USABLE
from lora_scripts.preflight.disk import DiskNeed
from lora_scripts.preflight.findings import Finding, Prediction
from lora_scripts.preflight.model_step import StepMeasurement
from lora_scripts.preflight.run_length import RunLength
from lora_scripts.preflight.wording import count, gigabytes, minutes
from lora_scripts.training.validation import FORWARD_SHARE, LARGEST_SHARE

__all__ = ["check_disk", "check_step", "predict", "prediction_note"]

TIGHT_DISK = 0.8
"""Share of the free room from which something else that grows can end the run."""
WAYS_TO_FIT = (
    "Close other programs that use the device; then batch_size: 1 with more gradient_accumulation_steps, "
    "gradient_checkpointing: true, a smaller resolution, train_text_encoder: false."
)


def check_disk(needs: Sequence[DiskNeed]) -> list[Finding]:
    """Findings about room for what will be written; `needs` of different disks."""
    findings = []
    for need in needs:
        if need.num_bytes > TIGHT_DISK * need.free_bytes:
            full = need.num_bytes > need.free_bytes
            findings.append(
                Finding(
                    "red" if full else "amber",
                    "disk-full" if full else "disk-tight",
                    f"The run will write about {gigabytes(need.num_bytes)} to {need.folder}; {gigabytes(need.free_bytes)} are free.",
                    remedy="Make room, set keep_checkpoints: 3, save less often with save_steps, or write to another disk.",
                )
            )
    return findings


def check_step(step: StepMeasurement) -> list[Finding]:
    """Findings about the measured step."""
    shape = f"{step.bucket[0]}x{step.bucket[1]}"
    if step.fitted == 0:
        text = f"Out of memory: not even one picture of {shape} can be trained on this device."
        return [Finding("red", "out-of-memory", text, remedy=WAYS_TO_FIT)]
    findings = []
    if step.fitted_run is not None and step.fitted_run.summary:
        text = f"Memory: {step.fitted_run.summary}."
        findings.append(
            Finding("note", "memory-plan", text)
            if step.fitted_run.fits
            else Finding("amber", "memory-short", text, remedy=WAYS_TO_FIT)
        )
    if not step.finite:
        findings.append(
            Finding(
                "red",
                "loss-not-finite",
                "The loss of a first step is not a finite number: the base model is broken or overflows in half precision.",
                remedy="Set mixed_precision: fp32; if that does not help, use another copy of the base model.",
            )
        )
    if step.fitted < step.wanted:
        findings.append(
            Finding(
                "amber",
                "batch-too-large",
                f"Out of memory with {step.wanted} pictures of {shape} at once; {step.fitted} fit. The run would cut its "
                "steps into such passes by itself.",
                remedy=f"Set batch_size: {step.fitted} and as many more gradient_accumulation_steps, for the same result.",
            )
        )
    elif step.device_bytes is not None and step.peak_bytes > USABLE * step.device_bytes:
        findings.append(
            Finding(
                "amber",
                "memory-tight",
                f"A step takes {gigabytes(step.peak_bytes)} of the device's {gigabytes(step.device_bytes)}: "
                "another program that wants some can end the run or slow it down.",
                remedy=WAYS_TO_FIT,
            )
        )
    return findings


def predict(
    config: RunConfig,
    length: RunLength,
    needs: Sequence[DiskNeed],
    step: StepMeasurement | None,
    previews: int,
) -> Prediction:
    """Time, memory and disk of the run.

    Args:
        previews: pictures rendered each time.
    """
    disk, free = sum(need.num_bytes for need in needs), min(need.free_bytes for need in needs)
    if step is None or step.fitted == 0:
        return Prediction(length.to_do, disk, free)
    passes = step.passes * -(-step.wanted // step.fitted)
    step_seconds = passes * step.seconds
    rendered = length.to_do // config.preview_every + 1 if config.preview_every else 0
    # With guidance each denoising step computes two pictures.
    picture_seconds = config.sample_steps * 2 * FORWARD_SHARE * step.seconds / step.fitted
    total = length.to_do * step_seconds * (1 + LARGEST_SHARE) + rendered * previews * picture_seconds
    return Prediction(length.to_do, disk, free, step_seconds, total, step.peak_bytes, step.device_bytes)


def prediction_note(prediction: Prediction) -> Iterable[Finding]:
    """The prediction in one sentence."""
    parts = []
    if prediction.step_seconds is not None and prediction.total_seconds is not None:
        parts.append(
            f"about {minutes(prediction.total_seconds)} for {count(prediction.steps, 'step')} of {prediction.step_seconds:.2g} s"
        )
    if prediction.peak_bytes is not None:
        of = f" of {gigabytes(prediction.device_bytes)}" if prediction.device_bytes else ""
        parts.append(f"{gigabytes(prediction.peak_bytes)}{of} memory")
    parts.append(f"{gigabytes(prediction.disk_bytes)} disk ({gigabytes(prediction.free_bytes)} free)")
    yield Finding("note", "prediction", f"Predicted: {', '.join(parts)}.")
