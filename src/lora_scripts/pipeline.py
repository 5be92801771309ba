"""config -> dataset -> model family -> adapter -> training loop -> export: the whole run, readable in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.config import RunConfig, Size
from lora_scripts.training.events import Events, RunStart

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.choosing.rule import Choice
    from lora_scripts.data.dataset import Dataset
    from lora_scripts.data.encoded import EncodedDataset
    from lora_scripts.families.protocol import ModelFamily
    from lora_scripts.hard_pictures import HardPicture
    from lora_scripts.models.source import BaseModel
    from lora_scripts.planning.fit_memory import FittedRun
    from lora_scripts.preflight.findings import Report

__all__ = ["Outcome", "list_targets", "run"]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    Attributes:
        complete: false when it was stopped early; then there are no files but the newest checkpoint's.
        files: the finished file first, then its card.
        proofs: what was compared after writing, one line each.
        advice: one line each.
        choice: the step whose weights the finished file holds, and why.
        check: what was found before the run.
        hard_pictures: those that were fitted worst, worst first.
    """

    complete: bool
    dataset: Dataset
    files: Sequence[Path] = ()
    proofs: Sequence[str] = ()
    advice: Sequence[str] = ()
    choice: Choice | None = None
    check: Report | None = None
    hard_pictures: Sequence[HardPicture] = ()


def run(
    config: RunConfig, events: Events, should_stop: Callable[[], bool] = lambda: False, *, force: bool = False
) -> Outcome:
    """Trains what the config describes, to the proved file; `should_stop` true saves and ends it after a step.

    The same `output_dir` again resumes at its newest whole checkpoint. With `force`, what the check finds red stops nothing.

    Raises:
        LoraScriptsError: anything the user can mend, said before the long work where that is possible.
    """
    import torch

    from lora_scripts.advice import advise
    from lora_scripts.attaching import attach_adapter
    from lora_scripts.choosing.chooser import Chooser
    from lora_scripts.choosing.clip import find_clip
    from lora_scripts.data.cache import EncodingCache, cache_folder
    from lora_scripts.data.captions import CaptionSettings
    from lora_scripts.data.dataset import open_dataset, require_folder
    from lora_scripts.data.encoded import encode_all
    from lora_scripts.data.sampler import StepPlan
    from lora_scripts.data.split import split
    from lora_scripts.devices import choose_device, choose_dtype
    from lora_scripts.families import family_class
    from lora_scripts.finish import Finish
    from lora_scripts.hard_pictures import hard_pictures, named
    from lora_scripts.judging import make_judge
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.planning.fit_memory import fit_memory
    from lora_scripts.preflight.before_run import check_before_run
    from lora_scripts.preflight.model_step import LoadedModel
    from lora_scripts.previews import Previews, preview_requests
    from lora_scripts.training.chosen import Chosen
    from lora_scripts.training.loop import Pauses, train
    from lora_scripts.training.lora_plus import parameter_groups
    from lora_scripts.training.optimizers import OptimizerSettings, make_optimizer
    from lora_scripts.training.resume import Resumable

    started_at = time.time()

    # The frozen model.
    require_folder(config)
    clip = find_clip(config)  # judges the pictures when all is done; a wrong name is told now
    source = resolve_base_model(config.base_model, allow_download=config.allow_download)
    device = choose_device(config.device)
    began = Chosen.read(config.output_dir)
    dtype = choose_dtype(config, device, source, began)
    events.note(f"Base model {source.title} ({source.family}): reading its weights.")
    family = family_class(source.family).load(source, config, device, dtype)
    resolution = config.resolution or (family.default_resolution, family.default_resolution)

    # Pictures and captions: checked, then each encoded once.
    def progress(what: str, done: int, total: int) -> None:
        events.progress(what, done, total)
        if should_stop():
            raise KeyboardInterrupt  # nothing is trained yet; what is encoded stays in the cache

    dataset = open_dataset(config, resolution)
    for line in dataset.notes:  # a row that fits no picture may be the reason for what the check finds
        events.note(line)
    cache = EncodingCache(cache_folder(config))
    model = LoadedModel(family, device)
    check = check_before_run(config, dataset, resolution, cache, model, events, progress, force)
    captions = CaptionSettings.of(config)
    data = encode_all(
        dataset,
        family.encoders(),
        captions,
        cache,
        flip=config.flip,
        num_workers=4 if config.num_workers == "auto" else config.num_workers,
        progress=progress,
    )
    for line in [*data.dataset.notes[len(dataset.notes) :], *data.dataset.summary()]:
        events.note(line)
    dataset = data.dataset
    family.release_encoders()

    # A few pictures are held out, to see whether what is learnt goes beyond the others.
    every_picture = dataset
    parts = split(data, config.validation_pictures)
    data, dataset = parts.train, parts.train.dataset
    events.note(parts.note)

    # The trainable layers, how a step is cut so that it fits into memory, and the order in which examples come.
    adapter = attach_adapter(family, config, events)
    fitted = fit_memory(config, family, adapter, data, device, began, check.fitted)
    config = fitted.config
    if fitted.summary:
        events.note(f"Memory: {fitted.summary}.", "info" if fitted.fits else "warning")
    plan = StepPlan(
        [example.name for example in dataset.examples],
        [example.fit.bucket for example in dataset.examples],
        [example.repeats for example in dataset.examples],
        config.step_size,
        config.seed,
    )
    max_steps = config.max_steps or (config.epochs or 10) * plan.steps_per_epoch
    groups = parameter_groups(adapter, lambda component: _rate(config, component), config.lora_plus_ratio)
    optimizer = make_optimizer(config.optimizer, groups, OptimizerSettings(weight_decay=config.weight_decay))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    advice = advise(config, dataset, max_steps, plan.uses_per_epoch, _num_parameters(family))
    for line in advice:
        events.note(line)

    # Where an earlier run in the same folder left off.
    finish = Finish(config, source, family, adapter, data, plan, resolution, max_steps, started_at)
    run_state = Resumable(config, source, every_picture, adapter, optimizer, scaler, max_steps, dtype, finish)
    state = run_state.restore(events)
    previews = Previews(
        family,
        adapter,
        preview_requests(config, dataset, resolution, device, _num_parameters(family)),
        optimizer,
        events,
    )
    events.started(_start(fitted, source, adapter, data, resolution, max_steps, state.step, device, dtype))
    judge, validate_every = make_judge(
        config, family, adapter, optimizer, parts, plan, max_steps, state, device, events
    )
    examples_trained = max_steps * plan.uses_per_epoch / plan.steps_per_epoch
    chooser = Chooser(config, clip, parts, examples_trained, run_state, previews, resolution, device, events)
    if state.step == 0:
        previews.render(0)
        if judge is not None:
            judge.validate(0)

    # Training.
    pauses = Pauses(
        save=lambda step: run_state.save(state, events),
        preview=previews.render,
        save_every=config.save_steps,
        preview_every=config.preview_every if previews.requests else 0,
        should_stop=should_stop,
        validate=judge.validate if judge is not None else lambda step: False,
        validate_every=validate_every,
    )
    complete = train(family, adapter, optimizer, data, plan, config, max_steps, state, pauses, events, device, scaler)
    if not complete:
        events.note(f"Stopped after step {state.step}. Run the same command again to go on from there.", "warning")
        return Outcome(False, dataset, advice=advice, check=check)

    # The best saved step becomes the finished file: written, read back and compared.
    for line in judge.summary() if judge is not None else ():
        events.note(line)
    choice = chooser.put_best_back(state)
    hard = hard_pictures(state.picture_losses, dataset.examples, chooser.caption_hits)
    if told := named(hard):
        events.note("\n".join(told))
    files = finish.export(choice.step, optimizer, previews, device, events)
    events.finished(files)
    return Outcome(True, dataset, files, finish.proofs, advice, choice, check, hard)


def list_targets(base_model: str) -> list[str]:
    """The names of all layers of a base model that can get an adapter, with their sizes."""
    from torch import device, float32, nn

    from lora_scripts.families import family_class
    from lora_scripts.models.source import resolve_base_model

    source = resolve_base_model(base_model)
    config = RunConfig(train_data_dir=Path(), base_model=base_model, output_dir=Path())
    family = family_class(source.family).load(source, config, device("cpu"), float32)
    return [
        f"{component}.{name}  {'x'.join(map(str, layer.weight.shape))}"
        for component, module in family.components.items()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]


def _rate(config: RunConfig, component: str) -> float:
    own = config.text_encoder_learning_rate
    return own if component.startswith("text_encoder") and own is not None else config.learning_rate


def _num_parameters(family: ModelFamily) -> int:
    return sum(p.numel() for module in family.components.values() for p in module.parameters())


def _start(
    fitted: FittedRun,
    source: BaseModel,
    adapter: Adapter,
    data: EncodedDataset,
    resolution: Size,
    max_steps: int,
    first_step: int,
    device: torch.device,
    dtype: torch.dtype,
) -> RunStart:
    from lora_scripts.devices import describe_device

    examples = data.dataset.examples
    buckets = ", ".join(f"{w}x{h}: {n}" for (w, h), n in data.dataset.bucket_counts.items())
    config = fitted.config
    settings: dict[str, Any] = config.model_dump(mode="json")
    settings |= {"resolution": f"{resolution[0]}x{resolution[1]}", "lora_alpha": config.alpha, "max_steps": max_steps}
    if fitted.summary:
        settings["memory"] = fitted.summary
    facts = [
        ("base model", f"{source.title} ({source.family})"),
        ("device", f"{describe_device(device)}, {str(dtype).removeprefix('torch.')}"),
        ("pictures", f"{len(examples)} ({buckets})"),
        (
            "LoRA",
            f"rank {config.lora_rank}, alpha {config.alpha:g}, {adapter.num_layers} layers, {adapter.num_parameters:,} weights",
        ),
        ("steps", f"{max_steps} of batch {config.batch_size} x {config.gradient_accumulation_steps}"),
        ("optimizer", f"{config.optimizer}, rate {config.learning_rate:g}, {config.lr_scheduler}"),
        ("output", str(config.output_dir)),
    ]
    return RunStart(settings, facts, [(example.name, example.caption) for example in examples], first_step, max_steps)
