"""One forward and one backward pass on real examples, measured for time and memory; nothing of it stays."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_scripts.training.draws import Draws
from lora_scripts.training.memory import memory_now, reset_peak
from lora_scripts.training.micro_batches import is_out_of_memory

if TYPE_CHECKING:
    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.config import Size
    from lora_scripts.data.dataset import Example
    from lora_scripts.data.encoded import EncodedDataset
    from lora_scripts.data.sampler import Sample
    from lora_scripts.families.protocol import ModelFamily

__all__ = ["TrialPass", "can_measure", "clear_device", "largest_pass", "trial_pass"]

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


def largest_pass(examples: Sequence[Example], batch_size: int) -> list[Example]:
    """The examples of the pass with the most pixels; a shape that cannot fill a batch makes smaller passes."""
    uses: Counter[Size] = Counter()
    for example in examples:
        uses[example.fit.bucket] += example.repeats
    size = {bucket: min(batch_size, number) for bucket, number in uses.items()}
    bucket = max(size, key=lambda b: (b[0] * b[1] * size[b], b))
    inside = [example for example in examples if example.fit.bucket == bucket]
    return [inside[i % len(inside)] for i in range(size[bucket])]


def trial_pass(
    family: ModelFamily,
    adapter: Adapter,
    data: EncodedDataset,
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
    family: ModelFamily, data: EncodedDataset, samples: Sequence[Sample], device: torch.device, seed: int
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
