"""Random numbers that belong to a run's seed and an example's name, and to nothing else.

Because no generator is carried from step to step, a batch of four equals two accumulated batches of two, and a resumed
run equals an unbroken one without any saved state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Draws"]


@dataclass(frozen=True)
class Draws:
    """Random tensors by key: every example's values depend on (seed, stream, key) alone.

    Two streams ("noise", "timestep", "posterior", "offset", "dropout", ...) of one example are independent. All
    results are on the CPU, so that a seed means the same on every device; the caller moves them.
    Attributes:
        seed: the run's seed, any integer.
    """

    seed: int

    def normal(self, keys: Sequence[str], shape: Sequence[int], stream: str) -> Tensor:
        """[B, *shape] float32, standard normal."""
        values = torch.empty(len(keys), *shape)
        generator = torch.Generator()
        for row, key in zip(values, keys, strict=True):
            row.normal_(generator=generator.manual_seed(self.seed_for(key, stream)))
        return values

    def uniform(self, keys: Sequence[str], stream: str) -> Tensor:
        """[B] float32, uniform in [0, 1)."""
        values = torch.empty(len(keys))
        generator = torch.Generator()
        for row, key in zip(values, keys, strict=True):
            row.uniform_(generator=generator.manual_seed(self.seed_for(key, stream)))
        return values

    def integers(self, keys: Sequence[str], low: int, high: int, stream: str) -> Tensor:
        """[B] int64, uniform in low ... high - 1.

        Raises:
            ValueError: the range is empty.
        """
        if low >= high:
            raise ValueError(f"no integer is in [{low}, {high})")
        values = torch.empty(len(keys), dtype=torch.int64)
        generator = torch.Generator()
        for row, key in zip(values, keys, strict=True):
            row.random_(low, high, generator=generator.manual_seed(self.seed_for(key, stream)))
        return values

    def fraction(self, key: str, stream: str) -> float:
        """Uniform in [0, 1), a plain number: for what shapes are decided by, also where tensors hold nothing."""
        return self.seed_for(key, stream) / 2**64

    def seed_for(self, key: str, stream: str) -> int:
        """A 64-bit seed for one key and stream, the same in every process and on every platform.

        torch's CPU generator reads only the low 32 bits: two of N keys share their values with a chance of about
        N**2 / 2**33, which harms nothing (two pictures of a long run see the same noise once).
        """
        text = f"{self.seed}\0{stream}\0{key}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
