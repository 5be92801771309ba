"""One forward and one backward pass on real examples, measured for time and memory; nothing of it stays."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from lora_scripts.data.sampler import mean_uses
from lora_scripts.data.training_data import TrainingExample
from lora_scripts.training.draws import Draws
from lora_scripts.training.memory import memory_now, reset_peak
from lora_scripts.training.micro_batches import is_out_of_memory

if TYPE_CHECKING:
    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.data.sampler import Sample
    from lora_scripts.data.training_data import TrainingData
    from lora_scripts.families.protocol import ModelFamily

__all__ = ["TrialPass", "can_measure", "clear_device", "largest_pass", "trial_pass"]

ExampleT = TypeVar("ExampleT", bound=TrainingExample)
SLOW_S = 5.0
"""A pass that takes longer is not repeated: what its first time costs more is then little of it."""


@dataclass(frozen=True)
class TrialPass:
    """What a pass took.

    Attributes:
        finite: whether the loss was a finite number.
        added_bytes: the most memory in use during it, less what was in use before; meaningful on CUDA alone.
    """

    seconds: float
    finite: bool
    added_bytes: int


def largest_pass(examples: Sequence[ExampleT], batch_size: int) -> list[ExampleT]:
    """The examples of the pass with the most pixels or tokens; a shape that cannot fill a batch makes smaller passes."""
    uses: dict[tuple[int, int], list[ExampleT]] = {}
    for example, times in zip(examples, mean_uses(examples), strict=True):
        uses.setdefault(example.shape, []).extend([example] * math.ceil(times - 1e-9))
    passes = {
        shape: sorted(same, key=lambda each: each.cost, reverse=True)[:batch_size] for shape, same in uses.items()
    }
    return max(passes.items(), key=lambda item: (sum(each.cost for each in item[1]), item[0]))[1]


def trial_pass(
    family: ModelFamily,
    adapter: Adapter,
    data: TrainingData,
    samples: Sequence[Sample],
    device: torch.device,
    seed: int,
) -> TrialPass | None:
    """The measured pass, or None when memory ran out; weights, gradients and random state are as before."""
    clear_device(device)
    reset_peak(device)
    before = memory_now(device).current_bytes
    try:
        seconds, finite = _timed(family, data, samples, device, seed)
        return TrialPass(seconds, finite, memory_now(device).peak_bytes - before)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        adapter.zero_grad()
        clear_device(device)


def can_measure(device: torch.device) -> bool:
    """Whether a pass's memory can be told from that of everything else: on CUDA, where torch keeps a peak to be reset."""
    return device.type == "cuda"


def clear_device(device: torch.device) -> None:
    """Gives back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(
    family: ModelFamily, data: TrainingData, samples: Sequence[Sample], device: torch.device, seed: int
) -> tuple[float, bool]:
    batch = data.batch(samples, device)
    # Dropout draws from the global generator: the run must find it as if no check had been.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for again in (False, True):
            began = time.perf_counter()
            loss = family.loss(batch, Draws(seed))
            loss.total.backward()  # type: ignore[no-untyped-call]
            _wait_for(device)
            seconds = time.perf_counter() - began
            if again or seconds > SLOW_S:
                break
    return seconds, bool(loss.total.isfinite())


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
