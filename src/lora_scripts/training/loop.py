"""The training loop: the same for every model family, and the whole of it on one page."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lora_scripts.config import RunConfig
from lora_scripts.training.draws import Draws
from lora_scripts.training.events import Events, StepReport
from lora_scripts.training.lr_schedules import learning_rate_factor, resolve_warmup
from lora_scripts.training.memory import memory_now
from lora_scripts.training.optimizers import effective_learning_rates, set_learning_rates

if TYPE_CHECKING:
    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.data.encoded import EncodedDataset
    from lora_scripts.data.sampler import StepPlan
    from lora_scripts.families.protocol import ModelFamily

__all__ = ["LoopState", "Pauses", "train"]

SMOOTHING = 0.98


@dataclass
class LoopState:
    """What the loop carries from step to step besides weights and moments; saved with a checkpoint.

    Attributes:
        step: optimizer steps done.
        smoothed: the loss's moving average before its bias is corrected.
        smoothed_steps: how many losses went into it.
    """

    step: int = 0
    smoothed: float = 0.0
    smoothed_steps: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)

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
        save_every, preview_every: in steps; 0 for never. The last step always saves.
        should_stop: asked after every step; true saves and ends the loop early.
    """

    save: Callable[[int], None]
    preview: Callable[[int], None]
    save_every: int
    preview_every: int
    should_stop: Callable[[], bool] = lambda: False


def train(
    family: ModelFamily,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    data: EncodedDataset,
    plan: StepPlan,
    config: RunConfig,
    max_steps: int,
    state: LoopState,
    pauses: Pauses,
    events: Events,
    device: torch.device,
    scaler: torch.amp.GradScaler,
) -> bool:
    """Trains the adapter from `state.step` to `max_steps`; true when it got there, false when asked to stop.

    Every optimizer step takes the mean loss over all its examples, however they are cut into micro-batches.
    """
    draws = Draws(config.seed)
    warmup_steps = resolve_warmup(config.warmup_steps, max_steps)
    parameters = list(adapter.parameters())
    meter = _Meter(state, max_steps, plan.steps_per_epoch, events, device)

    while state.step < max_steps:
        step = state.step

        # The rate and everything random follow from the step's number, so a resumed run needs no saved generator.
        factor = learning_rate_factor(config.lr_scheduler, step, max_steps, warmup_steps, num_cycles=_cycles(config))
        set_learning_rates(optimizer, factor)
        if config.lora_dropout:
            torch.manual_seed(draws.seed_for(str(step), "dropout"))

        # Forward and backward, one micro-batch at a time.
        total, count = torch.zeros((), device=device), 0
        for uses in plan.micro_batches(plan.step(step), config.batch_size):
            loss = family.loss(data.batch(uses, device), draws)
            scaler.scale(loss.total).backward()  # type: ignore[no-untyped-call]
            total += loss.total.detach()
            count += loss.count

        # One mean per optimizer step.
        scaler.unscale_(optimizer)
        adapter.scale_grads(1 / count)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        meter.add(total / count, grad_norm, count)
        events.ticked(state.step)

        # Numbers are fetched from the device only every so often, because each fetch makes it wait.
        stopping = pauses.should_stop()
        last = state.step == max_steps
        saving = last or stopping or state.step % pauses.save_every == 0
        if saving or state.step % config.log_steps == 0:
            meter.report(effective_learning_rates(optimizer))

        # Saves and previews.
        if saving:
            state.scaler = scaler.state_dict()
            pauses.save(state.step)
        if pauses.preview_every and (last or state.step % pauses.preview_every == 0) and not stopping:
            pauses.preview(state.step)
        if saving or pauses.preview_every:
            meter.resume_clock()
        if stopping and not last:
            return False
    return True


def _cycles(config: RunConfig) -> float | None:
    return float(config.lr_cycles) if config.lr_scheduler == "cosine_with_restarts" else None


class _Meter:
    """Collects losses on the device and turns them into reports."""

    def __init__(
        self, state: LoopState, max_steps: int, steps_per_epoch: int, events: Events, device: torch.device
    ) -> None:
        self._state, self._max_steps, self._steps_per_epoch = state, max_steps, steps_per_epoch
        self._events, self._device = events, device
        self._losses: list[torch.Tensor] = []
        self._grad_norm = torch.zeros(())
        self._examples = 0
        self._began = time.perf_counter()

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor, examples: int) -> None:
        self._losses.append(loss)
        self._grad_norm = grad_norm
        self._examples += examples

    def report(self, learning_rates: dict[str, float]) -> None:
        if not self._losses:
            return
        losses = torch.stack(self._losses).tolist()
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
                grad_norm=float(self._grad_norm),
                examples_per_s=self._examples / seconds,
                eta_s=(self._max_steps - step) * seconds / len(losses),
                memory=memory_now(self._device),
            )
        )
        self._losses, self._examples = [], 0
        self._began = time.perf_counter()

    def resume_clock(self) -> None:
        """Leaves the time of a save or preview out of the speed."""
        if not self._losses:
            self._began = time.perf_counter()
