"""The training loop: the same for every model family, and the whole of it on one page."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_scripts.config import RunConfig
from lora_scripts.data.ahead import BatchesAhead
from lora_scripts.errors import TrainingError
from lora_scripts.processes import ONE, Processes
from lora_scripts.training.anomalies import Action, Guard, Verdict
from lora_scripts.training.draws import Draws
from lora_scripts.training.ema import update_average
from lora_scripts.training.events import Events, StepReport
from lora_scripts.training.lr_schedules import learning_rate_factor, resolve_warmup
from lora_scripts.training.memory import memory_now
from lora_scripts.training.micro_batches import MicroBatches
from lora_scripts.training.optimizers import effective_learning_rates, set_learning_rates
from lora_scripts.training.picture_losses import PictureLosses
from lora_scripts.training.snapshot import Snapshot
from lora_scripts.training.speed import PLAIN, Speed
from lora_scripts.training.spill import SpillGuard
from lora_scripts.training.throughput import ThroughputMeter

if TYPE_CHECKING:
    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.data.sampler import Sample, StepPlan
    from lora_scripts.data.training_data import TrainingData
    from lora_scripts.families.protocol import Loss, ModelFamily

__all__ = ["LoopState", "Pauses", "train"]

SMOOTHING = 0.98


@dataclass
class LoopState:
    """What the loop carries from step to step besides weights and moments; saved with a checkpoint.

    Attributes:
        step: optimizer steps done.
        smoothed: the loss's moving average before its bias is corrected.
        smoothed_steps: how many losses went into it.
        micro_batch: examples in one pass, once memory has shown how many fit; 0 before the first step.
        checkpointing: whether activations are computed again in the backward pass.
        block_swap: blocks of the frozen model that were swapped.
        guard: what the guard against anomalies remembers.
        validations: every measurement of the validation loss so far, as `training.validation` keeps them.
        best_step: the saved step that would be exported now; None without measurements.
        ended: early stopping has ended the run at this step.
        picture_losses: what `training.picture_losses` has collected up to here.
        num_processes: that the run began on.
    """

    step: int = 0
    smoothed: float = 0.0
    smoothed_steps: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 0
    checkpointing: bool = False
    block_swap: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    ended: bool = False
    picture_losses: dict[str, Any] = field(default_factory=dict)
    num_processes: int = 1

    def smooth(self, loss: float) -> float:
        """Takes in one loss; the bias-corrected average."""
        if math.isfinite(loss):
            self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
            self.smoothed_steps += 1
        return self.smoothed / (1 - SMOOTHING**self.smoothed_steps) if self.smoothed_steps else loss


@dataclass(frozen=True)
class Pauses:
    """What is done between steps, and when.

    Attributes:
        save, preview: called with the number of steps done.
        validate: the same, in every process; true when early stopping ends the run, which then saves and is complete.
        save_every, preview_every, validate_every: in steps; 0 for never. The last step always saves.
        should_stop: asked after every step; true saves and ends the loop early.
    """

    save: Callable[[int], None]
    preview: Callable[[int], None]
    save_every: int
    preview_every: int
    should_stop: Callable[[], bool] = lambda: False
    validate: Callable[[int], bool] = lambda step: False
    validate_every: int = 0


def train(
    family: ModelFamily,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    data: TrainingData,
    plan: StepPlan,
    config: RunConfig,
    max_steps: int,
    state: LoopState,
    pauses: Pauses,
    events: Events,
    device: torch.device,
    scaler: torch.amp.GradScaler,
    processes: Processes = ONE,
    speed: Speed = PLAIN,
) -> bool:
    """Trains the adapter from `state.step` to `max_steps`; true when the run is complete, false when asked to stop.

    Every optimizer step takes the mean loss over all its examples, however they are cut into micro-batches and over processes.

    Raises:
        TrainingError: loss or gradients failed again and again, also with a lower rate; the checkpoints stay.
    """
    draws = Draws(plan.seed)
    warmup_steps = resolve_warmup(config.warmup_steps, max_steps)
    parameters = list(adapter.parameters())
    throughput = ThroughputMeter(family, device)
    meter = _Meter(state, max_steps, plan.steps_per_epoch, events, device, throughput)
    guard = Guard(**state.guard)
    saved = Snapshot.take(adapter, optimizer, scaler, vars(state))
    micro_batches = MicroBatches(
        plan, state.micro_batch or config.micro_batch, events, device, may_halve=processes.shards is None
    )
    spill = SpillGuard(micro_batches, events, device)
    num_examples = len(data.examples)
    picture_losses = PictureLosses(num_examples, state.picture_losses)

    one_pass = speed.training_pass(family, draws, parameters, scaler, device, events)
    home = data.home or torch.device("cpu")
    batches = BatchesAhead(lambda uses: family.drawn(data.batch(uses, home), draws), device)

    def backward(uses: Sequence[Sample]) -> Loss:
        loss = one_pass(throughput.batch(lambda: batches.take(uses)))
        picture_losses.add(uses, loss)
        return loss

    def lend_a_pass(uses: Sequence[Sample]) -> None:
        """One that counts for nothing here, because another process computes one that takes all of them."""
        grads = [parameter.grad for parameter in parameters]
        adapter.zero_grad()
        one_pass(batches.take(uses[:1]))
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad

    def begin_again() -> None:
        one_pass.forget()
        batches.forget()
        adapter.zero_grad()
        picture_losses.begin()

    def announce(step: int) -> None:
        if step < max_steps:
            batches.expect(plan.micro_batches(processes.share(plan.step(step)), micro_batches.size))

    while state.step < max_steps and not state.ended:
        step, uses_of_step = state.step, plan.step(state.step)

        # The rate and everything random follow from the step's number, so a resumed run needs no saved generator.
        factor = learning_rate_factor(config.lr_scheduler, step, max_steps, warmup_steps, num_cycles=_cycles(config))
        set_learning_rates(optimizer, factor * guard.rate)
        if config.lora_dropout:
            torch.manual_seed(draws.seed_for(str(step), "dropout"))

        # Forward and backward, one micro-batch at a time.
        began = time.perf_counter()
        speed.before_step(step)
        picture_losses.begin()
        if not batches.num_announced:
            announce(step)
        announce(step + 1)
        with processes.passing():
            total, count = micro_batches.run(processes.share(uses_of_step), backward, begin_again)
            for _ in range(processes.idle_passes(uses_of_step, micro_batches.num_passes)):
                lend_a_pass(uses_of_step)

        # One mean per optimizer step.
        total, count = processes.sum_step(parameters, total, count)
        scaler.unscale_(optimizer)
        adapter.scale_grads(1 / count)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)

        # Bad numbers go no further. Two floats are fetched for this, the only wait for the device in a step: a limit that
        # moves with the run is judged here, and weights that have taken a bad step could not be mended later.
        mean, norm = torch.stack([total / count, grad_norm.to(total)]).tolist()
        spill.after_step(time.perf_counter() - began, [data.examples[use.index] for use in uses_of_step])
        state.micro_batch = micro_batches.size
        overflow = scaler.is_enabled() and math.isfinite(mean) and not math.isfinite(norm)  # the scaler's to handle
        verdict = Verdict(Action.TAKE) if overflow else guard.judge(step, mean, norm)
        if verdict.action is Action.TAKE:
            scaler.step(optimizer)
        else:
            events.note(f"Step {step + 1}: {verdict.reason}. {_left_out(data, uses_of_step, config)}", "warning")
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if verdict.action is Action.END:
            raise TrainingError(_end_reason(step, verdict, saved, config))
        if verdict.action is Action.GO_BACK:
            vars(state).update(saved.restore(adapter, optimizer, scaler))
            guard = Guard(**state.guard)
            guard.lower_rate()
            picture_losses = PictureLosses(num_examples, state.picture_losses)
            batches.forget()
            meter.forget()
            events.rewound(
                state.step,
                f"Back to the state after step {state.step}; the learning rate is now {guard.rate:g} of what was set.",
            )
            continue
        state.step += 1
        state.guard = asdict(guard)
        taken = verdict.action is Action.TAKE and not overflow
        if taken and config.ema_decay:
            update_average(optimizer, state.step, config.ema_decay)
        meter.add(mean if taken else math.nan, norm, count)
        if taken:
            picture_losses.keep()
        events.ticked(state.step)

        # Readings of the machine are taken only every so often.
        stopping = processes.any(pauses.should_stop())
        last = state.step == max_steps
        if pauses.validate_every and (last or state.step % pauses.validate_every == 0):
            meter.report(effective_learning_rates(optimizer))
            one_pass.forget()
            state.ended = pauses.validate(state.step) and not last
        saving = last or stopping or state.ended or state.step % pauses.save_every == 0
        if saving or state.step % config.log_steps == 0:
            meter.report(effective_learning_rates(optimizer))
            picture_losses.fetch(processes)

        # Saves and previews.
        if saving:
            state.picture_losses = picture_losses.state
            if processes.is_first:
                pauses.save(state.step)
            saved = Snapshot.take(adapter, optimizer, scaler, vars(state))
        ending = last or state.ended
        if pauses.preview_every and (ending or state.step % pauses.preview_every == 0) and not stopping:
            with processes.first_alone() as alone:
                if alone:
                    one_pass.forget()
                    pauses.preview(state.step)
        if saving or pauses.preview_every or pauses.validate_every:
            meter.resume_clock()
        if stopping and not ending:
            return False
    return True


def _left_out(data: TrainingData, uses: Sequence[Sample], config: RunConfig) -> str:
    """What was in a step that is not taken."""
    names = dict.fromkeys(data.examples[use.index].name for use in uses)
    return f"The step is left out, no weight was changed. Its {config.words.examples}: {', '.join(names)}."


def _end_reason(step: int, verdict: Verdict, saved: Snapshot, config: RunConfig) -> str:
    kept = saved.loop["step"]
    file = config.output_dir / f"checkpoint-{kept}" / f"{config.name}-{kept}.safetensors"
    return (
        f"Training ended at step {step + 1}: {verdict.reason}, again and again, also with a lower learning rate. "
        + (f"The LoRA of step {kept} is good: {file}. " if kept else "No step was saved before. ")
        + f"Look at the {config.words.examples} named above, and use a lower learning_rate or mixed_precision: fp32 in a new output_dir."
    )


def _cycles(config: RunConfig) -> float | None:
    return float(config.lr_cycles) if config.lr_scheduler == "cosine_with_restarts" else None


class _Meter:
    """Collects losses and turns them into reports."""

    def __init__(
        self,
        state: LoopState,
        max_steps: int,
        steps_per_epoch: int,
        events: Events,
        device: torch.device,
        throughput: ThroughputMeter,
    ) -> None:
        self._state, self._max_steps, self._steps_per_epoch = state, max_steps, steps_per_epoch
        self._events, self._device, self._throughput = events, device, throughput
        self._losses: list[float] = []
        self._grad_norm = 0.0
        self._examples = 0
        self._began = time.perf_counter()

    def add(self, loss: float, grad_norm: float, examples: int) -> None:
        """Takes in one step; its loss is NaN when it was not taken."""
        self._losses.append(loss)
        self._grad_norm = grad_norm
        self._examples += examples

    def report(self, learning_rates: dict[str, float]) -> None:
        if not self._losses:
            return
        losses = self._losses
        smoothed = [self._state.smooth(loss) for loss in losses][-1]
        seconds = max(time.perf_counter() - self._began, 1e-9)
        step = self._state.step
        self._events.stepped(
            StepReport(
                step=step,
                max_steps=self._max_steps,
                epoch=step / self._steps_per_epoch,
                losses=losses,
                loss_smoothed=smoothed,
                learning_rates=learning_rates,
                grad_norm=self._grad_norm,
                rate=self._examples / seconds,
                eta_s=(self._max_steps - step) * seconds / len(losses),
                memory=memory_now(self._device),
                throughput=self._throughput.take(seconds),
            )
        )
        self._losses, self._examples = [], 0
        self._began = time.perf_counter()

    def forget(self) -> None:
        """Drops what was collected since the last report: the run goes back before it."""
        self._losses, self._examples = [], 0
        self._throughput.forget()
        self._began = time.perf_counter()

    def resume_clock(self) -> None:
        """Leaves the time of a save or preview out of the speed."""
        if not self._losses:
            self._began = time.perf_counter()
