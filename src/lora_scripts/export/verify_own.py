"""The proof that a file in an adapter's own kind holds what was trained: read back from the disk, compared, and run.

The header is parsed by hand; what the tensors mean is said by `adapters.parts`, which is checked against LyCORIS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.adapters.parts import change_from_parts
from lora_scripts.errors import ExportError, ModelError
from lora_scripts.export.effect import Effect, measure_effect, whole_paths
from lora_scripts.export.names import FileNames, kohya_layer_names
from lora_scripts.export.read_back import MOST_LOST, Verification, check_keys, read_tensors_by_hand

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_scripts.adapters.weights import LayerChange, LayerChanges

__all__ = ["applied_own_file", "verify_own_effect", "verify_own_file"]


def verify_own_file(
    path: Path, expected: LayerChanges, base_weight: Callable[[str], Tensor], names: FileNames | None = None
) -> Verification:
    """Reads a finished file back and compares it with what was trained, tensor by tensor and change by change.

    Args:
        base_weight: layer name to its frozen weight, float32.
    Raises:
        ExportError: the file cannot be read; a key is missing or unknown; a tensor is not what was trained, rounded to the
            file's dtype; rounding has lost more than 5 % of the change; every change is zero.
    """
    import torch

    tensors, metadata, header_bytes, dtype = read_tensors_by_hand(path)
    names = kohya_layer_names(expected) if names is None else names
    wanted = {f"{names[layer]}.{part}": t for layer, change in expected.items() for part, t in change.parts().items()}
    check_keys(path, tensors, wanted)
    kind = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    for key, tensor in wanted.items():
        found = tensors[key]
        rounded = tensor if key.endswith(".alpha") else tensor.detach().cpu().to(kind).float()
        if not torch.isfinite(found).all():
            raise ExportError(f"{path}: failed: {key} holds numbers that are not finite. Do not use this file.")
        if found.shape != rounded.shape or not torch.allclose(found, rounded, rtol=1e-6, atol=0):
            raise ExportError(f"{path}: failed: {key} is not what was trained. Check the disk and export again.")
    error = size = 0.0
    num_zero = 0
    for layer, trained in expected.items():
        weight = base_weight(layer)
        filed = _change(path, tensors, names[layer], trained.shape)
        delta, found = trained.delta(weight).double(), filed.delta(weight).double()
        error += float((found - delta).square().sum())
        size += float(delta.square().sum())
        num_zero += not found.any()
    if num_zero == len(expected):
        raise ExportError(
            f"{path}: failed: the adapter changes nothing, every one of its {len(expected)} layers is zero. "
            "Train longer or with a higher learning_rate; with fp16, small numbers become zero: set save_precision to fp32."
        )
    relative = (error / size) ** 0.5 if size else float("inf")
    if relative > MOST_LOST:
        raise ExportError(
            f"{path}: failed: rounding to {dtype} has changed the adapter by {relative:.1e} of its size. "
            "Set save_precision to fp32 and export again."
        )
    count = sum(tensor.numel() for tensor in tensors.values())
    return Verification(path, len(expected), len(tensors), count, dtype, relative, num_zero, header_bytes, metadata)


def verify_own_effect(
    path: Path,
    components: Mapping[str, nn.Module],
    forward: Callable[[], Tensor],
    trained_output: Tensor,
    names: FileNames,
    tolerance: float = 0.02,
    compute_dtype: torch.dtype | None = None,
) -> Effect:
    """As `verify.verify_effect`, for a file in its own kind."""
    return measure_effect(
        path, forward, lambda: applied_own_file(path, components, names), trained_output, tolerance, compute_dtype
    )


@contextmanager
def applied_own_file(path: Path, components: Mapping[str, nn.Module], names: FileNames) -> Iterator[None]:
    """The file's changes at work beside the frozen layers; gone afterwards.

    Raises:
        ExportError: the file cannot be read, or names a layer that the components lack.
    """
    from lora_scripts.adapters.layer import weight_shape
    from lora_scripts.export.names import wrapped_layer

    tensors = read_tensors_by_hand(path)[0]
    modules = {
        names[layer]: module
        for component, root in components.items()
        for inner, module in root.named_modules()
        if (layer := f"{component}.{inner}") in names
    }
    pairs = []
    for name in sorted({key.partition(".")[0] for key in tensors}):
        if name not in modules:
            raise ExportError(f"{path}: failed: {name} is no layer of the model it was trained on.")
        shape = weight_shape(wrapped_layer(modules[name]))
        pairs.append((modules[name], _change(path, tensors, name, shape)))
    with whole_paths(pairs):
        yield


def _change(path: Path, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> LayerChange:
    parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    try:
        return change_from_parts(parts, shape)
    except ModelError as error:
        raise ExportError(f"{path}: failed: {name}: {error}.") from error
