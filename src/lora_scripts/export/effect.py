"""Whether a finished file changes the model's output as the trained adapter did: run, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ExportError
from lora_scripts.export.names import wrapped_layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_scripts.adapters.weights import LayerChange, LoRATensors
    from lora_scripts.export.read_back import StoredLayer

__all__ = ["Effect", "compare_effect", "measure_effect", "side_paths", "whole_paths"]


@dataclass(frozen=True)
class Effect:
    """How the file's change of the model's output compares with the trained adapter's.

    Attributes:
        trained_change, file_change: root mean square over the output's elements.
        base_size: the same of the output without the LoRA.
        relative_difference: of the two changes' difference, over the trained change.
        conclusive: False where the change is smaller than the rounding of the output's dtype, so that no comparison
            could fail.
        largest_difference: of any one element of the two outputs.
    """

    trained_change: float
    file_change: float
    base_size: float
    relative_difference: float
    conclusive: bool
    largest_difference: float = 0.0

    def __str__(self) -> str:
        if not self.conclusive:
            return f"effect too small to compare in this precision ({self.trained_change:.1e} of {self.base_size:.1e})"
        return (
            f"effect compared: the file changes the model's output as the training did, difference "
            f"{self.relative_difference:.1e} of the change"
        )


def measure_effect(
    path: Path,
    forward: Callable[[], Tensor],
    applied: Callable[[], AbstractContextManager[None]],
    trained_output: Tensor,
    tolerance: float = 0.02,
    compute_dtype: torch.dtype | None = None,
) -> Effect:
    """Runs the model without any LoRA and with the file's, and compares the file's change with the trained one.

    Args:
        forward: the model's output for one fixed input.
        applied: puts the file's LoRA to work for the length of its block.
        trained_output, tolerance, compute_dtype: see `compare_effect`.
    Raises:
        ExportError: the file changes nothing in the output, or not what the trained adapter changes.
    """
    import torch

    with torch.no_grad():
        base = forward()
        with applied():
            filed = forward()
        again = forward()
    unsteady = _rms((again - base).double())  # kernels of some devices do not add in a fixed order
    return compare_effect(path, base, filed, trained_output, tolerance, compute_dtype, unsteady)


def compare_effect(
    path: Path,
    base: Tensor,
    filed: Tensor,
    trained: Tensor,
    tolerance: float = 0.02,
    compute_dtype: torch.dtype | None = None,
    unsteady: float = 0.0,
) -> Effect:
    """Compares three outputs of one input: without LoRA, with the file's, and with the trained adapter.

    Args:
        tolerance: allowed difference of the two changes, as a fraction of the trained change.
        compute_dtype: what the layers compute in, where it is coarser than the output's dtype (autocast).
        unsteady: how much two runs of the same thing differ, root mean square.
    Raises:
        ExportError: the file changes nothing in the output, or not what the trained adapter changes.
    """
    import torch

    rounding = torch.finfo(compute_dtype or base.dtype).eps
    base, filed, trained = base.double(), filed.double(), trained.detach().to(base.device).double()
    trained_change, file_change = _rms(trained - base), _rms(filed - base)
    difference, base_size = _rms(filed - trained), _rms(base)
    # Two ways to compute one function differ by a few roundings of the output after some hundred layers.
    noise = max(8 * rounding * base_size, 3 * unsteady)
    conclusive = trained_change > 2 * noise
    if file_change == 0.0 and conclusive:
        raise ExportError(
            f"{path}: failed: the file changes nothing in the model's output, the training did "
            f"({trained_change:.1e} of {base_size:.1e}). Do not use this file."
        )
    relative = difference / trained_change if trained_change else float("inf")
    if conclusive and difference > tolerance * trained_change + noise:
        raise ExportError(
            f"{path}: failed: the file changes the model's output otherwise than the trained adapter, by "
            f"{relative:.1%} of the change. Do not use this file; set save_precision to fp32 and export again."
        )
    largest = float((filed - trained).abs().max())
    return Effect(trained_change, file_change, base_size, relative, conclusive, largest)


@contextmanager
def side_paths(pairs: Iterable[tuple[nn.Module, LoRATensors | StoredLayer]]) -> Iterator[None]:
    """Low-rank changes at work beside frozen layers, added to their outputs; gone afterwards."""
    hooks = []
    try:
        for module, low_rank in pairs:
            hooks.append(module.register_forward_hook(_side_path(module, low_rank)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _side_path(module: nn.Module, low_rank: LoRATensors | StoredLayer) -> Callable[..., Tensor]:
    import torch.nn.functional as F

    inner, scale = wrapped_layer(module), low_rank.scale
    # In float32 whatever the file's dtype is, as its readers compute it.
    down, up = (matrix.float().to(inner.weight.device) for matrix in (low_rank.lora_A, low_rank.lora_B))

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(down.dtype)
        if down.ndim == 4:
            small = F.conv2d(x, down, None, inner.stride, inner.padding, inner.dilation, inner.groups)
            change = F.conv2d(small, up)
        else:
            change = x @ down.T @ up.T
        return output + (scale * change).to(output.dtype)

    return add


@contextmanager
def whole_paths(pairs: Iterable[tuple[nn.Module, LayerChange]]) -> Iterator[None]:
    """Changes of any kind at work beside frozen layers, each as a whole weight; gone afterwards."""
    hooks = []
    try:
        for module, change in pairs:
            hooks.append(module.register_forward_hook(_whole_path(module, change)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _whole_path(module: nn.Module, change: LayerChange) -> Callable[..., Tensor]:
    from lora_scripts.adapters.dense import dense_weight
    from lora_scripts.adapters.layer import applied

    inner = wrapped_layer(module)
    delta = change.delta(dense_weight(inner))

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + applied(inner, inputs[0].to(delta.dtype), delta).to(output.dtype)

    return add


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())
