"""config -> data -> model family -> adapter -> training loop -> export: the whole run, readable in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.config import RunConfig
from lora_scripts.processes import ONE, LostProcessError, Processes, spread_over
from lora_scripts.training.events import Events, RunStart

if TYPE_CHECKING:
    import torch

    from lora_scripts.choosing.rule import Choice
    from lora_scripts.data.training_data import Listing
    from lora_scripts.hard_examples import HardExample
    from lora_scripts.planning.fit_memory import FittedRun
    from lora_scripts.preflight.findings import Report
    from lora_scripts.tasks.protocol import Run, Task

__all__ = ["Outcome", "list_targets", "run"]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    Attributes:
        complete: false when it was stopped early; then there are no files but the newest checkpoint's.
        dataset: what trained.
        files: the finished LoRA first, then what belongs to it.
        proofs: what was compared after writing, one line each.
        advice: one line each.
        choice: the step whose weights the finished file holds, and why.
        check: what was found before the run.
        hard_examples: those that were fitted worst, worst first.
    """

    complete: bool
    dataset: Listing
    files: Sequence[Path] = ()
    proofs: Sequence[str] = ()
    advice: Sequence[str] = ()
    choice: Choice | None = None
    check: Report | None = None
    hard_examples: Sequence[HardExample] = ()


def run(
    config: RunConfig,
    events: Events,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    force: bool = False,
    processes: Processes = ONE,
) -> Outcome:
    """Trains what the config describes, to the proved file; `should_stop` true saves and ends it after a step.

    The same `output_dir` again resumes at its newest whole checkpoint. With `force`, what the check finds red stops nothing.
    On several processes all of them train and measure; the first one encodes, renders and writes, and is lent their weights.

    Raises:
        LoraScriptsError: anything the user can mend, said before the long work where that is possible.
    """
    import torch

    from lora_scripts.advice import advise
    from lora_scripts.allocator import keep_freed_memory
    from lora_scripts.attaching import attach_adapter
    from lora_scripts.base_loras import find_base_loras, with_base_loras
    from lora_scripts.choosing.chooser import Chooser
    from lora_scripts.data.sampler import StepPlan
    from lora_scripts.devices import choose_device, choose_dtype
    from lora_scripts.families import family_class, num_parameters
    from lora_scripts.folding import fold_base_loras
    from lora_scripts.going_on import older_digest, seed_of_draws
    from lora_scripts.hard_examples import hard_examples, named
    from lora_scripts.judging import make_judge
    from lora_scripts.low_bit_choice import choose_low_bit
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.planning.choose_swap import choose_block_swap
    from lora_scripts.planning.fit_memory import fit_memory
    from lora_scripts.speed_rules import require_processes
    from lora_scripts.speeding import choose_speed, keep_at_hand
    from lora_scripts.tasks import require_inputs, task_of
    from lora_scripts.tasks.protocol import Run
    from lora_scripts.training.chosen import Chosen
    from lora_scripts.training.loop import Pauses, train
    from lora_scripts.training.lora_plus import parameter_groups
    from lora_scripts.training.optimizers import OptimizerSettings, make_optimizer
    from lora_scripts.training.resume import Resumable

    started_at = time.time()

    # The frozen model, with the LoRAs beneath the one that trains.
    require_processes(config, processes.count)
    require_inputs(config)
    config = choose_low_bit(config, events)
    beneath = find_base_loras(config)
    source = resolve_base_model(config.base_model, allow_download=config.allow_download, task=config.task_type)
    source = with_base_loras(source, beneath)
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    began = Chosen.read(config.output_dir)
    config = spread_over(config, processes, began)
    dtype = choose_dtype(config, device, source, began)
    config = choose_block_swap(config, source, device, dtype, began, events, processes)
    task = task_of(config)
    events.note(f"Base model {source.title} ({source.family}): reading its weights.")
    family = family_class(source.family).load(source, config, device, dtype)
    processes = replace(processes, shards=family.shards)
    for line in fold_base_loras(family.components, beneath):
        events.note(line)

    # The data: checked, each example encoded once, and a few held out to see whether what is learnt goes beyond the others.
    def progress(what: str, done: int, total: int) -> None:
        events.progress(what, done, total)
        if should_stop():
            raise KeyboardInterrupt  # nothing is trained yet; what is encoded stays in the cache

    with processes.first_goes_ahead():
        prepared = task.prepare(family, device, events, progress, force)
    parts, data = prepared.parts, prepared.parts.train
    events.note(parts.note)

    # The trainable layers, how a step is cut so that it fits into memory, and the order in which examples come.
    adapter = attach_adapter(family, config, events)
    fitted = fit_memory(config, family, adapter, data, device, began, prepared.check.fitted)
    config = fitted.config
    if fitted.summary:
        events.note(f"Memory: {fitted.summary}.", "info" if fitted.fits else "warning")
    older = older_digest(config.init_lora_weights)
    plan = StepPlan.of(data.examples, config.step_size, seed_of_draws(config.seed, older))
    max_steps = config.max_steps or (config.epochs or 10) * plan.steps_per_epoch
    groups = parameter_groups(adapter, lambda component: _rate(config, component), config.lora_plus_ratio)
    optimizer = make_optimizer(config.optimizer, groups, OptimizerSettings(weight_decay=config.weight_decay))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    learnt = [example for example in data.examples if not example.is_regularization]
    advice = advise(config, len(learnt), max_steps, plan.uses_per_epoch, num_parameters(family))
    for line in advice:
        events.note(line)

    # Where an earlier run in the same folder left off.
    this = Run(
        config, source, family, adapter, optimizer, prepared, plan, max_steps, started_at, device, events, beneath
    )
    previews = task.previews(this)
    finishing = task.finishing(this, previews)
    run_state = Resumable(
        config, source, prepared.listing, adapter, optimizer, scaler, max_steps, dtype, finishing, beneath, older
    )
    with processes.first_goes_ahead():
        state = run_state.restore(events)
    state.num_processes = state.num_processes if state.step else processes.count
    events.started(_start(task, this, fitted, state.step, dtype, processes))
    judge, validate_every = make_judge(this, state, processes)
    chooser = Chooser(config, task.comparison(this, run_state, previews), run_state, previews, events)
    if state.step == 0:
        with processes.first_alone() as alone:
            if alone:
                previews.render(0)
        if judge is not None:
            judge.validate(0)

    # Training.
    check = prepared.check.prediction
    speed = choose_speed(
        config, family, data, device, max_steps - state.step, check.step_seconds if check else None, events
    )
    pauses = Pauses(
        save=lambda step: run_state.save(state, events),
        preview=previews.render,
        save_every=config.save_steps,
        preview_every=config.preview_every if previews.requests else 0,
        should_stop=should_stop,
        validate=judge.validate if judge is not None else lambda step: False,
        validate_every=validate_every,
    )
    try:
        complete = train(
            family, adapter, optimizer, keep_at_hand(data, device), plan, config, max_steps, state, pauses, events,
            device, scaler, processes, speed,
        )  # fmt: skip
    except LostProcessError:
        if processes.is_first and state.step:
            run_state.save(state, events)  # weights change only with a step that all processes have completed
        raise
    if not complete:
        events.note(f"Stopped after step {state.step}. Run the same command again to go on from there.", "warning")
        return Outcome(False, data.dataset, advice=advice, check=prepared.check)

    # The best saved step becomes the finished file: written, read back and compared.
    with processes.first_alone() as alone:
        if not alone:
            return Outcome(True, data.dataset)
        for line in judge.summary(config.words) if judge is not None else ():
            events.note(line)
        choice = chooser.put_best_back(state)
        hard = hard_examples(state.picture_losses, data.examples, chooser.caption_hits, config.words)
        if told := named(hard, config.words):
            events.note("\n".join(told))
        files = finishing.export(choice.step)
    events.finished(files)
    return Outcome(True, data.dataset, files, finishing.proofs, advice, choice, prepared.check, hard)


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


def _start(
    task: Task, run: Run, fitted: FittedRun, first_step: int, dtype: torch.dtype, processes: Processes
) -> RunStart:
    from lora_scripts.adapter_rules import adapter_size
    from lora_scripts.base_loras import named
    from lora_scripts.devices import describe_device

    config, adapter = run.config, run.adapter
    settings: dict[str, Any] = config.model_dump(mode="json") | task.settings()
    settings |= {"lora_alpha": config.alpha, "max_steps": run.max_steps}
    if fitted.summary:
        settings["memory"] = fitted.summary
    facts = [
        ("base model", f"{run.source.title} ({run.source.family})"),
        *([("base LoRAs", named(run.beneath))] if run.beneath else []),
        ("device", f"{describe_device(run.device)}, {str(dtype).removeprefix('torch.')}"),
        *task.facts(),
        *([("processes", processes.described)] if processes.count > 1 else []),
        (
            "LoRA",
            f"{adapter_size(config)}, {adapter.num_layers} layers, {adapter.num_parameters:,} weights",
        ),
        ("steps", f"{run.max_steps} of batch {config.batch_size} x {config.gradient_accumulation_steps}"),
        ("optimizer", f"{config.optimizer}, rate {config.learning_rate:g}, {config.lr_scheduler}"),
        *([("average", f"of the weights, decay {config.ema_decay:g}")] if config.ema_decay else []),
        ("output", str(config.output_dir)),
    ]
    captions = [
        (example.name, example.caption)
        for example in run.prepared.parts.train.examples
        if not example.is_regularization
    ]
    return RunStart(settings, facts, captions, first_step, run.max_steps)
