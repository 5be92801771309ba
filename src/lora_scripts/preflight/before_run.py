"""The check at the start of every run: its findings are told, and anything red stops a run that has not begun yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig, Size
from lora_scripts.data.dataset import Dataset
from lora_scripts.preflight.findings import Report
from lora_scripts.preflight.gather import Progress
from lora_scripts.preflight.run import preflight
from lora_scripts.preflight.terminal import report_notes
from lora_scripts.preflight.wording import count
from lora_scripts.training.checkpoint import list_checkpoints

if TYPE_CHECKING:
    import torch

    from lora_scripts.data.cache import EncodingCache
    from lora_scripts.preflight.model_step import LoadedModel
    from lora_scripts.training.events import Events

__all__ = ["check_before_run", "is_measured", "tell_or_refuse"]


def is_measured(device: torch.device, goes_on: bool) -> bool:
    """Whether the check tries a step of the model.

    On a graphics card that takes a moment, and whether it fits is the question of a first run. On a CPU it takes as long
    as the first step itself; a run that goes on has shown that it fits.
    """
    return device.type == "cuda" and not goes_on


def check_before_run(
    config: RunConfig,
    dataset: Dataset,
    resolution: Size,
    cache: EncodingCache,
    model: LoadedModel,
    events: Events,
    progress: Progress,
    force: bool,
) -> Report:
    """Checks what is about to be trained, before the long work, and tells every finding.

    A run that goes on from a checkpoint is never stopped here: its findings were weighed when it began, or are guesses
    (room on the disk) that may be wrong while nobody is there to answer. What would make it another run, such as a
    changed picture or caption, is refused where it resumes.

    Args:
        progress: may raise to stop.
        force: anything red becomes a warning.
    Raises:
        DataError: something is red, `force` is not set and no checkpoint is in the output folder.
        LoraScriptsError: a setting names layers or a LoRA that are not there.
    """
    measure = is_measured(model.device, goes_on=bool(list_checkpoints(config.output_dir)))
    report = preflight(config, dataset, resolution, cache, model, measure=measure, progress=progress)
    tell_or_refuse(report, config, events, force)
    return report


def tell_or_refuse(report: Report, config: RunConfig, events: Events, force: bool) -> None:
    """Tells every finding of a check, and refuses the run where `check_before_run` says so.

    Raises:
        DataError: something is red, `force` is not set and no checkpoint is in the output folder.
    """
    goes_on = bool(list_checkpoints(config.output_dir))
    refused = report.blocked and not force and not goes_on
    # What is red is then told by the error, once.
    for text, is_warning in report_notes(report, with_red=not refused):
        events.note(text, "warning" if is_warning else "info")
    if report.blocked and not refused:
        why = "a run that goes on is not stopped" if goes_on else "--force starts the run all the same"
        events.note(f"The check found {count(report.count('red'), 'red finding')}; {why}.", "warning")
    report.require_good(force or goes_on)
