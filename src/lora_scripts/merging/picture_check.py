"""The proof that a merged picture model is its base plus the adapters: read back tensor by tensor, never loaded as a whole.

Weights are compared by what they do to random inputs, (W' - W) x against the change times x: for a plain LoRA that is
up (down x), computed without the code that added it.

Legend for shapes: in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.adapters.weights import LayerChange, LoRATensors
from lora_scripts.errors import ExportError
from lora_scripts.models.weights_file import WeightsHeader, inspect_weights, read_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from lora_scripts.merging.picture_model import Changes
    from lora_scripts.merging.stream import Change

__all__ = ["MergedCheck", "check_merged_files"]

_INPUTS = 4
"""Random inputs for each layer."""
_ROWS_BYTES = 32_000_000
"""Room for the rows that are in float32 at a time."""


@dataclass(frozen=True)
class MergedCheck:
    """What was found.

    Attributes:
        num_layers: that were compared.
        rounding: size of the difference from base + change over the size of the change, all layers together: what rounding
            to the base's dtype took from the LoRA.
        change: size of the change over that of the weights.
    """

    num_layers: int
    rounding: float
    change: float

    def __str__(self) -> str:
        return (
            f"read back, {self.num_layers} layers are base + LoRA: the weights change by {self.change:.2%} of their size, "
            f"{self.rounding:.1%} of that is rounding to the base's number format"
        )


def check_merged_files(headers: tuple[WeightsHeader, ...], changes: Changes, base: Path, output: Path) -> MergedCheck:
    """Compares every changed tensor of the written files with the base's.

    Args:
        headers: of the base's files.
        base, output: file or folder of both.
    Raises:
        ExportError: a layer is further from base + change than rounding explains, or nothing was changed at all.
        ModelError: the output cannot be read.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    found = _Found()
    for header in headers:
        path = output if base.is_file() else output / header.path.relative_to(base)
        written = inspect_weights(path)
        for (file, name), by_place in changes.items():
            if file != header.path:
                continue
            [(_, before)], [(_, after)] = read_tensors(header, [name]), read_tensors(written, [name])
            for place, parts in by_place.items():
                old, new = (tensor if place is None else place.view_of(tensor) for tensor in (before, after))
                difference, bound = found.add(old, new, parts, generator)
                if difference > bound:
                    raise ExportError(
                        f"{path}: failed: {name} is not base + LoRA; it differs by {difference:.1e}, rounding explains "
                        f"{bound:.1e}. Delete the file, check the disk and merge again."
                    )
    if not found.wanted:
        raise ExportError(f"{output}: failed: the LoRA changes nothing, every one of its layers is zero.")
    return MergedCheck(found.num_layers, (found.wrong / found.wanted) ** 0.5, (found.wanted / found.weights) ** 0.5)


@dataclass
class _Found:
    """Squared sizes of what random inputs show: of the error, the change and the weights."""

    num_layers: int = 0
    wrong: float = 0.0
    wanted: float = 0.0
    weights: float = 0.0

    def add(self, old: Tensor, new: Tensor, parts: Sequence[Change], generator: torch.Generator) -> tuple[float, float]:
        """(error, bound of it) of one layer; `old` and `new` are its weight before and after."""
        import torch

        x = torch.randn(new[0].numel(), _INPUTS, generator=generator)
        wanted = torch.zeros(new.shape[0], _INPUTS)
        for part in parts:
            wanted += part.weight * _effect(part.read(), old, x)
        wrong = weights = size = 0.0
        rows = max(1, _ROWS_BYTES // (4 * new[0].numel()))
        for start in range(0, new.shape[0], rows):
            own = slice(start, start + rows)
            before, after = old[own].float().flatten(1), new[own].float().flatten(1)
            wrong += float(((after - before) @ x - wanted[own]).square().sum())
            weights += float((before @ x).square().sum())
            size += float(after.square().sum())
        self.num_layers += 1
        self.wrong, self.weights = self.wrong + wrong, self.weights + weights
        self.wanted += float(wanted.square().sum())
        # Each weight is rounded once, by half a unit in its last place at most, and the inputs add the errors up like a random
        # walk: four times its length is hardly ever met. Float32 sums before that are off by a few units of their own.
        info = torch.finfo(new.dtype)
        bound = size**0.5 * (info.eps / 2 + 1e-6) + new.numel() ** 0.5 * info.smallest_normal * info.eps
        return wrong**0.5, 4 * _INPUTS**0.5 * bound


def _effect(change: LayerChange, weight: Tensor, x: Tensor) -> Tensor:
    """[out, N] the change times x, float32; `weight` [out, in] or [out, in, k, k] as it is stored."""
    if isinstance(change, LoRATensors) and change.magnitude is None:
        up, down = change.lora_B.float().flatten(1), change.lora_A.float().flatten(1)
        product: Tensor = change.scale * (up @ (down @ x))
        return product
    return change.delta(weight.float()).flatten(1) @ x
