"""Gives a peer's trainer the random numbers that ours draws, so that both have the same loss in every step.

A trainer that is not ours asks torch and diffusers for its randomness: for the order of the pictures, a sample of the
autoencoder's latents, noise, noise levels. These calls are answered from a file instead. What the trainer computes with them is
its own. The file holds, for S steps of B pictures: `noise` and `posterior` [S,B,C,h,w] float32, `timesteps` [S,B] int64; the
pictures lie in their folder in the order in which the steps use them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Steps", "put_in_place"]


class Steps:
    """Which step's numbers are given out.

    A step that would lie behind the last one begins the file anew.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._number = self._encoded = 0

    def next(self) -> None:
        self._number += 1

    def of_step(self, name: str) -> Tensor:
        values = self._tensors[name]
        return values[self._number % len(values)]

    def posterior(self, count: int) -> Tensor:
        """For the next pictures that are encoded: a cache encodes ahead of the steps, but in the same order."""
        values = self._tensors["posterior"].flatten(0, 1)
        rows = [(self._encoded + row) % len(values) for row in range(count)]
        self._encoded += count
        return values[rows]


def put_in_place(file: Path) -> Steps:
    """From here on torch and diffusers give out what the file holds; the caller says when a step is over."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    steps = Steps(load_file(file))
    randn_like, randint = torch.randn_like, torch.randint

    def noise(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        drawn = steps.of_step("noise")
        if tensor.shape != drawn.shape:
            return randn_like(tensor, *arguments, **named)
        return drawn.to(tensor.device, tensor.dtype)

    def timesteps(low: int, high: int, size: Any, **named: Any) -> Tensor:
        drawn = steps.of_step("timesteps")
        if (low, high, tuple(size)) != (0, 1000, tuple(drawn.shape)):
            return randint(low, high, size, **named)
        return drawn.to(named.get("device", "cpu"))

    def sample(distribution: Any, generator: Any = None) -> Tensor:
        mean: Tensor = distribution.mean
        return mean + distribution.std * steps.posterior(len(mean)).to(mean.device, mean.dtype)

    def in_order(sampler: Any) -> Iterator[int]:
        return iter(range(len(sampler.data_source)))

    torch.randn_like, torch.randint = noise, timesteps  # type: ignore[assignment]
    DiagonalGaussianDistribution.sample = sample
    torch.utils.data.RandomSampler.__iter__ = in_order  # type: ignore[method-assign]
    random.shuffle = lambda values: None  # type: ignore[assignment]
    return steps
