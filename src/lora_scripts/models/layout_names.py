"""What the tables of names in original-layout files share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Place", "Shapes", "count_numbers", "one_to_one"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of all tensors of a single file, by their names in it."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a module lies in a file.

    Attributes:
        name: of the file's tensor.
        third: 0, 1 or 2 where it is that third of the file's rows; None where it is all of them.
        turned: whether the file holds its transpose.
    """

    name: str
    third: int | None = None
    turned: bool = False

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the file's tensor, from that of the module's."""
        if self.third is not None:
            return (3 * shape[0], *shape[1:])
        return shape[::-1] if self.turned else shape

    def view_of(self, stored: Tensor) -> Tensor:
        """The module's tensor within the file's, without a copy: what is written to one is in the other."""
        if self.third is not None:
            rows = len(stored) // 3
            return stored[self.third * rows : (self.third + 1) * rows]
        return stored.T if self.turned else stored

    def taken_from(self, stored: Tensor) -> Tensor:
        """The module's tensor, from the file's; with memory of its own where it is not all of it."""
        if self.third is not None:
            return self.view_of(stored).clone()
        return stored.T.contiguous() if self.turned else stored


def one_to_one(names: Iterable[str], place: Callable[[str], str], prefix: str) -> dict[str, str]:
    """Each name with its place behind a prefix; two names never share one place."""
    mapping = {name: prefix + place(name) for name in names}
    assert len(set(mapping.values())) == len(mapping), "two names share one place"
    return mapping


def count_numbers(shapes: Shapes, prefix: str) -> int:
    """How many numbers follow a prefix, 0 to N - 1.

    Raises:
        ValueError: there are none, or one is left out.
    """
    numbers = {int(match[1]) for name in shapes if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    if not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"{prefix}*")
    return len(numbers)
