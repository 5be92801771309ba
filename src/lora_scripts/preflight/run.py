"""All checks of a run, in the order in which what they need becomes known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig, Size
from lora_scripts.data.dataset import Dataset
from lora_scripts.preflight.check_captions import CutCaption, check_captions
from lora_scripts.preflight.check_masks import check_masks
from lora_scripts.preflight.check_pictures import check_pictures
from lora_scripts.preflight.check_regularization import check_regularization
from lora_scripts.preflight.check_shapes import check_shapes
from lora_scripts.preflight.findings import Finding, Prediction, Report
from lora_scripts.preflight.gather import DataFacts, Progress, gather
from lora_scripts.preflight.run_length import RunLength, run_length

if TYPE_CHECKING:
    from lora_scripts.data.cache import EncodingCache
    from lora_scripts.planning.fit_memory import FittedRun
    from lora_scripts.preflight.model_step import LoadedModel

__all__ = ["check_data", "preflight"]


def check_data(
    config: RunConfig,
    dataset: Dataset,
    cache: EncodingCache,
    cut: CutCaption | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """What can be said of pictures and captions alone.

    Args:
        cut: the part of a caption that the text encoder reads; None leaves the token limit out.
        progress: told ("check", done, total) while pictures are measured; may raise to stop.
    """
    facts = gather(config, dataset, cache, progress)
    return Report(_data_findings(config, facts, cut), len(facts.examples), facts.num_pictures)


def preflight(
    config: RunConfig,
    dataset: Dataset,
    resolution: Size,
    cache: EncodingCache,
    model: LoadedModel,
    *,
    measure: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Everything that can be said before a run: data, steps, disk, and with `measure` one step's time and memory.

    The model is as before afterwards; what is encoded for the one step stays in the cache, where the run finds it.

    Raises:
        LoraScriptsError: a setting names layers or a LoRA that are not there, or a picture changed meanwhile.
    """
    facts = gather(config, dataset, cache, progress)
    findings = _data_findings(config, facts, model.family.cut_caption)
    prediction, fitted = None, None
    if facts.examples:
        length = run_length(config, facts.examples)
        findings += check_shapes(facts.examples, config, length)
        more, prediction, fitted = _resources(config, dataset, facts, length, resolution, cache, model, measure)
        findings += more
    return Report(findings, len(facts.examples), facts.num_pictures, prediction, fitted)


def _data_findings(config: RunConfig, facts: DataFacts, cut: CutCaption | None) -> list[Finding]:
    return [
        *check_pictures(facts),
        *check_captions(facts, config, cut),
        *check_regularization(facts, config),
        *check_masks(facts, config),
    ]


def _resources(
    config: RunConfig,
    dataset: Dataset,
    facts: DataFacts,
    length: RunLength,
    resolution: Size,
    cache: EncodingCache,
    model: LoadedModel,
    measure: bool,
) -> tuple[list[Finding], Prediction, FittedRun | None]:
    from dataclasses import replace

    from lora_scripts.attaching import attach_adapter
    from lora_scripts.preflight.check_resources import check_disk, check_step, predict, prediction_note
    from lora_scripts.preflight.disk import encoding_need, merge_by_disk, output_need
    from lora_scripts.preflight.model_step import measure_step
    from lora_scripts.previews import preview_requests
    from lora_scripts.training.events import Events

    dataset = replace(dataset, examples=facts.examples)
    family = model.family
    num_parameters = sum(p.numel() for module in family.components.values() for p in module.parameters())
    previews = len(preview_requests(config, dataset, resolution, model.device, num_parameters))
    adapter = attach_adapter(family, config, Events())
    try:
        step = measure_step(model, adapter, config, dataset, cache) if measure else None
    finally:
        adapter.detach()
    needs = [output_need(config, length, adapter.num_parameters, len(facts.examples), previews, resolution)]
    if step is not None and cache.folder is not None:
        views = len(facts.examples) * (2 if config.flip else 1)
        needs.append(encoding_need(cache.folder, views, step.encoded_bytes))
    disks = merge_by_disk(needs)
    prediction = predict(config, length, disks, step, previews)
    findings = [*check_disk(disks), *(check_step(step) if step is not None else [])]
    return [*findings, *prediction_note(prediction)], prediction, step.fitted_run if step is not None else None
