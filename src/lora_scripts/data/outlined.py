"""Pictures as a plan sees them: names and shapes, with batches that hold no picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lora_scripts.data.buckets import Framing
from lora_scripts.data.dataset import Dataset, Example
from lora_scripts.families.protocol import Batch

if TYPE_CHECKING:
    from lora_scripts.data.sampler import Sample
    from lora_scripts.families.protocol import PictureFamily

__all__ = ["OutlinedPictures"]


@dataclass(frozen=True)
class OutlinedPictures:
    """Training data, as `data.training_data.TrainingData` describes it, of a family without weights.

    Its batches are what the family's encoders make of empty pictures and captions: fake tensors of the right shapes.
    """

    dataset: Dataset
    family: PictureFamily
    home: torch.device | None = None

    @property
    def examples(self) -> Sequence[Example]:
        return self.dataset.examples

    def part(self, indices: Sequence[int]) -> OutlinedPictures:
        return replace(self, dataset=replace(self.dataset, examples=[self.examples[i] for i in indices]))

    def as_written(self) -> OutlinedPictures:
        return self

    def at_home_on(self, device: torch.device, most_bytes: int) -> OutlinedPictures:
        return self

    def batch(self, samples: Sequence[Sample], device: torch.device) -> Batch:
        example = self.examples[samples[0].index]
        width, height = example.shape
        empty = {
            "image": torch.zeros(3, height, width),
            "mask": torch.ones(1, height, width),
            "fit": Framing(example.size, example.fit),
            "caption": "",
        }
        rows: dict[str, torch.Tensor] = {}
        for encoder in self.family.encoders():
            rows |= encoder.run([empty[encoder.reads]])[0]
        tensors = {name: torch.stack([row.to(device)] * len(samples)) for name, row in rows.items()}
        return Batch(tensors, [""] * len(samples), [sample.key for sample in samples])
