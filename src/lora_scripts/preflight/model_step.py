"""One forward and one backward pass of the largest shape, measured for time and memory; nothing of it stays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lora_scripts.config import RunConfig, Size
from lora_scripts.data.cache import EncodingCache
from lora_scripts.data.captions import CaptionSettings
from lora_scripts.data.dataset import Dataset, Example
from lora_scripts.data.encoded import EncodedDataset, encode_all
from lora_scripts.data.sampler import Sample
from lora_scripts.planning.fit_memory import FittedRun, fit_memory
from lora_scripts.planning.memory_plan import optimizer_bytes
from lora_scripts.planning.trial_pass import TrialPass, largest_pass, trial_pass
from lora_scripts.training.chosen import Chosen
from lora_scripts.training.memory import memory_now
from lora_scripts.training.micro_batches import is_out_of_memory

if TYPE_CHECKING:
    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.families.protocol import PictureFamily

__all__ = ["LoadedModel", "StepMeasurement", "measure_step"]


@dataclass(frozen=True)
class LoadedModel:
    """The frozen model of a run, where it will train."""

    family: PictureFamily
    device: torch.device


@dataclass(frozen=True)
class StepMeasurement:
    """What one pass took.

    Attributes:
        bucket: its shape in pixels.
        wanted: examples of the largest pass as the config has it.
        fitted: how many of them went in at once; 0 when not even one did.
        seconds: of one pass with `fitted` examples.
        peak_bytes: the most memory in use, with what the optimizer will add.
        device_bytes: memory of the device, None where it is not known.
        finite: whether the loss was a finite number.
        encoded_bytes: of one picture and its caption in the cache.
        passes: of `wanted` examples in an optimizer step.
        fitted_run: the config with what its settings on auto come to.
    """

    bucket: Size
    wanted: int
    fitted: int
    seconds: float = 0.0
    peak_bytes: int = 0
    device_bytes: int | None = None
    finite: bool = True
    encoded_bytes: int = 0
    passes: int = 1
    fitted_run: FittedRun | None = None


def measure_step(
    model: LoadedModel, adapter: Adapter, config: RunConfig, dataset: Dataset, cache: EncodingCache
) -> StepMeasurement:
    """Encodes one batch, runs it forward and backward, and clears up: weights, gradients, random state are as before.

    When the batch does not fit into memory, halves of it are tried, as the run will do. The encoders are still on the
    device, so the peak is a little above that of the run.

    Raises:
        DataError: one of the pictures was changed since the data set was listed.
    """
    examples = largest_pass(dataset.examples, config.micro_batch)
    bucket, wanted = examples[0].fit.bucket, len(examples)
    device = model.device
    try:
        data = _encode(model, config, dataset, examples, cache)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return StepMeasurement(bucket, wanted, 0, device_bytes=_device_bytes(device))
    fitted_run = fit_memory(config, model.family, adapter, data, device, Chosen.read(config.output_dir))
    wanted = min(wanted, fitted_run.config.micro_batch)

    def trial(size: int) -> TrialPass | None:
        return trial_pass(model.family, adapter, data, _samples(data, size), device, config.seed)

    # Kernels are chosen and buffers made in a first pass, which may take a hundred times as long: one example pays for it.
    fitted = wanted if trial(1) is not None else 0
    timed = None
    while fitted and timed is None:
        timed = trial(fitted)
        if timed is None:
            fitted = (fitted + 1) // 2 if fitted > 1 else 0
    peak = memory_now(device).peak_bytes + adapter.num_parameters * optimizer_bytes(config)
    return StepMeasurement(
        bucket,
        wanted,
        fitted,
        timed.seconds if timed is not None else 0.0,
        peak,
        _device_bytes(device),
        timed is None or timed.finite,
        _encoded_bytes(data),
        fitted_run.config.gradient_accumulation_steps,
        fitted_run,
    )


def _encode(
    model: LoadedModel, config: RunConfig, dataset: Dataset, examples: Sequence[Example], cache: EncodingCache
) -> EncodedDataset:
    few = replace(
        dataset, examples=list({example.name: example for example in examples}.values()), left_out=[], notes=[]
    )
    return encode_all(few, model.family.encoders(), CaptionSettings.of(config), cache, flip=config.flip, num_workers=2)


def _samples(data: EncodedDataset, size: int) -> list[Sample]:
    return [Sample(i % len(data.dataset.examples), f"preflight/{i}", (i / size, 1 / size)) for i in range(size)]


def _device_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _encoded_bytes(data: EncodedDataset) -> int:
    rows = [*list(data.images.values())[:1], *list(data.texts.values())[:1]]
    return sum(tensor.numel() * tensor.element_size() for row in rows for tensor in row.values())
