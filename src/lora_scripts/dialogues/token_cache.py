"""Tokenised rows on disk, some thousand in a file, so that a crash costs at most one of them.

Legend for shapes: E examples of a chunk, T all their tokens, J bytes of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Chunk", "ChunkExample", "from_tensors", "to_tensors"]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkExample:
    """One example of the chunk's row number `row`; `suffix` tells examples of one row apart."""

    row: int
    suffix: str
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]


@dataclass
class Chunk:
    """What tokenising some rows gave; rows are counted from the chunk's first.

    Attributes:
        faults: (row, suffix, reason) of what cannot train.
        cut: (row, suffix, tokens before the cut).
        remarks: what was done in an unusual way -> the rows.
    """

    examples: list[ChunkExample] = field(default_factory=list)
    faults: list[tuple[int, str, str]] = field(default_factory=list)
    cut: list[tuple[int, str, int]] = field(default_factory=list)
    remarks: dict[str, list[int]] = field(default_factory=dict)


def to_tensors(chunk: Chunk) -> dict[str, Tensor]:
    """`tokens` [T] int32, `trained` [T] uint8, `lengths` and `rows` [E] int32, and all else as JSON `about` [J] uint8."""
    import numpy as np
    import torch

    about = {
        "suffixes": [each.suffix for each in chunk.examples],
        "faults": chunk.faults,
        "cut": chunk.cut,
        "remarks": chunk.remarks,
    }

    def joined(arrays: Sequence[NDArray[np.int32]] | Sequence[NDArray[np.bool_]], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype))

    return {
        "tokens": joined([each.tokens for each in chunk.examples], np.int32),
        "trained": joined([each.trained for each in chunk.examples], np.uint8),
        "lengths": torch.tensor([len(each.tokens) for each in chunk.examples], dtype=torch.int32),
        "rows": torch.tensor([each.row for each in chunk.examples], dtype=torch.int32),
        "about": torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8),
    }


def from_tensors(tensors: dict[str, Tensor]) -> Chunk:
    """The chunk that `to_tensors` was given; its arrays are views of the tensors."""
    import numpy as np

    about = json.loads(tensors["about"].numpy().tobytes())
    edges = [0, *np.cumsum(tensors["lengths"].numpy()).tolist()]
    tokens, trained = tensors["tokens"].numpy(), tensors["trained"].numpy().view(np.bool_)
    examples = [
        ChunkExample(row, suffix, tokens[begin:end], trained[begin:end])
        for row, suffix, (begin, end) in zip(tensors["rows"].tolist(), about["suffixes"], pairwise(edges), strict=True)
    ]
    faults = [(int(row), str(suffix), str(reason)) for row, suffix, reason in about["faults"]]
    cut = [(int(row), str(suffix), int(length)) for row, suffix, length in about["cut"]]
    return Chunk(examples, faults, cut, about["remarks"])
