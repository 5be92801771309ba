"""The proof that a finished LoRA file holds what was trained: read back from the disk, compared, and run.

Nothing here is shared with the code that wrote the file: the header is parsed by hand, the names are taken from the
file's own keys, and the effect is measured with the file's tensors on the real layers.

Legend for shapes: R rank, in/out the layer's features or channels, k kernel size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ExportError
from lora_scripts.export.names import KOHYA_PREFIXES, wrapped_layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_scripts.adapters.weights import LoRATensors, LoRAWeights

__all__ = ["Effect", "Verification", "applied_file", "verify_effect", "verify_file"]

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_WIDTH = {"F16": 2, "BF16": 2, "F32": 4}
MOST_LOST = 0.05
"""Largest share of the trained change that may be lost to numbers too small for the file's dtype."""
_SUFFIXES = (".alpha", ".lora_down.weight", ".lora_up.weight")


@dataclass(frozen=True)
class Verification:
    """What was found in a finished file.

    Attributes:
        num_tensors: all of them matched a trained layer.
        relative_error: size of the difference between the file's and the trained weight changes, over the latter's size.
        num_zero_layers: layers whose change is exactly zero in the file.
        header_bytes: length of the header.
    """

    path: Path
    num_layers: int
    num_tensors: int
    num_parameters: int
    dtype: str
    relative_error: float
    num_zero_layers: int
    header_bytes: int
    metadata: Mapping[str, str]

    def __str__(self) -> str:
        return (
            f"{self.path.name}: read back, {self.num_tensors} of {self.num_tensors} tensors in {self.num_layers} layers "
            f"matched, all finite, difference from the trained weights {self.relative_error:.1e} ({self.dtype})"
        )


@dataclass(frozen=True)
class Effect:
    """How the file's change of the model's output compares with the trained adapter's.

    Attributes:
        trained_change, file_change: root mean square over the output's elements.
        base_size: the same of the output without the LoRA.
        relative_difference: of the two changes' difference, over the trained change.
        conclusive: False where the change is smaller than the rounding of the output's dtype, so that no comparison
            could fail.
    """

    trained_change: float
    file_change: float
    base_size: float
    relative_difference: float
    conclusive: bool

    def __str__(self) -> str:
        if not self.conclusive:
            return f"effect too small to compare in this precision ({self.trained_change:.1e} of {self.base_size:.1e})"
        return (
            f"effect compared: the file changes the model's output as the training did, difference "
            f"{self.relative_difference:.1e} of the change"
        )


def verify_file(
    path: str | Path,
    expected: LoRAWeights,
    prefixes: Mapping[str, str] = KOHYA_PREFIXES,
) -> Verification:
    """Reads a finished kohya file back and compares it with what was trained.

    Raises:
        ExportError: the file cannot be read; a key is missing, unknown or of another shape; a number is not finite;
            alpha differs; a weight change is further from the trained one than the file's dtype explains; every change
            is zero. The text says "failed" and what to do.
    """
    import torch

    path = Path(path)
    tensors, metadata, header_bytes, dtype = _read(path)
    names = {_spelling(layer, prefixes): layer for layer in expected}
    _check_keys(path, tensors, names)
    error = size = floor = 0.0
    num_zero = 0
    info = torch.finfo(getattr(torch, _DTYPES[dtype]))
    for name, layer in names.items():
        trained = expected[layer]
        alpha, down, up = (tensors[name + suffix] for suffix in _SUFFIXES)
        for suffix, tensor, shape in zip(
            _SUFFIXES, (alpha, down, up), ((), trained.lora_A.shape, trained.lora_B.shape), strict=True
        ):
            if tuple(tensor.shape) != tuple(shape):
                raise ExportError(
                    f"{path}: failed: {name}{suffix} is {list(tensor.shape)} in the file, {list(shape)} was trained."
                )
            if not torch.isfinite(tensor).all():
                raise ExportError(
                    f"{path}: failed: {name}{suffix} holds numbers that are not finite. Do not use this file; export an "
                    "earlier checkpoint, or set save_precision to fp32."
                )
        if abs(float(alpha) - trained.alpha) > 1e-6 * abs(trained.alpha):
            raise ExportError(
                f"{path}: failed: {name}.alpha is {float(alpha):g} in the file, {trained.alpha:g} was trained."
            )
        layer_error, layer_size, file_size = _compare(trained, down, up, float(alpha))
        error += layer_error
        size += layer_size
        # Numbers near the smallest that the dtype holds are off by half of that, whatever their own size; a small share
        # lost so harms nobody, a larger one is training thrown away.
        floor += up.numel() * float((trained.scale * info.smallest_normal * info.eps / 2 * trained.lora_A.norm()) ** 2)
        num_zero += file_size == 0.0
    if num_zero == len(names):
        raise ExportError(
            f"{path}: failed: the LoRA changes nothing, every one of its {len(names)} layers is zero. "
            "Train longer or with a higher learning_rate; with fp16, numbers under 6e-8 become zero: set save_precision to fp32."
        )
    relative = (error / size) ** 0.5 if size else float("inf")
    # A tensor is off by half a unit in its last place at most; both factors together, with some room.
    tolerance = max(16 * info.eps / 2, 2e-6)
    if relative > MOST_LOST or error**0.5 > tolerance * size**0.5 + floor**0.5:
        raise ExportError(
            f"{path}: failed: the weight changes in the file differ from the trained ones by {relative:.1e} of their size, "
            f"rounding to {dtype} explains {tolerance:.1e}. Set save_precision to fp32 and export again."
        )
    num_parameters = sum(tensors[name + suffix].numel() for name in names for suffix in _SUFFIXES[1:])
    return Verification(
        path, len(names), len(tensors), num_parameters, dtype, relative, num_zero, header_bytes, metadata
    )


def verify_effect(
    path: str | Path,
    components: Mapping[str, nn.Module],
    forward: Callable[[], Tensor],
    trained_output: Tensor,
    prefixes: Mapping[str, str] = KOHYA_PREFIXES,
    tolerance: float = 0.02,
    compute_dtype: torch.dtype | None = None,
) -> Effect:
    """Runs the model without any LoRA and with the file's, and compares the file's change with the trained one.

    Call it while the trained adapter is switched off or taken away.

    Args:
        components: the modules the LoRA was trained on, `{"unet": ..., "text_encoder": ...}`.
        forward: the model's output for one fixed input; it must run the components given.
        trained_output: what `forward` gave with the trained adapter at work.
        tolerance: allowed difference of the two changes, as a fraction of the trained change.
        compute_dtype: what the layers compute in, where it is coarser than the output's dtype (autocast).
    Raises:
        ExportError: the file changes nothing in the output, or not what the trained adapter changes.
    """
    import torch

    path = Path(path)
    with torch.no_grad():
        base = forward()
        with applied_file(path, components, prefixes):
            filed = forward()
        again = forward()
    rounding = torch.finfo(compute_dtype or base.dtype).eps
    unsteady = _rms((again - base).double())  # kernels of some devices do not add in a fixed order
    base, filed, trained = base.double(), filed.double(), trained_output.detach().to(base.device).double()
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
    return Effect(trained_change, file_change, base_size, relative, conclusive)


@contextmanager
def applied_file(
    path: str | Path, components: Mapping[str, nn.Module], prefixes: Mapping[str, str] = KOHYA_PREFIXES
) -> Iterator[None]:
    """The file's LoRA at work on the components, layer by layer beside the frozen weights; gone afterwards.

    Raises:
        ExportError: the file cannot be read, or names a layer that the components lack.
    """
    path = Path(path)
    tensors = _read(path)[0]
    modules = {
        _spelling(f"{component}.{name}", prefixes): module
        for component, root in components.items()
        if component in prefixes
        for name, module in root.named_modules()
    }
    hooks = []
    try:
        for name in sorted(
            {key.rpartition(suffix)[0] for key in tensors for suffix in _SUFFIXES if key.endswith(suffix)}
        ):
            if name not in modules:
                raise ExportError(f"{path}: failed: {name} is no layer of the model it was trained on.")
            down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
            scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
            hooks.append(modules[name].register_forward_hook(_side_path(modules[name], down, up, scale)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _side_path(module: nn.Module, down: Tensor, up: Tensor, scale: float) -> Callable[..., Tensor]:
    import torch.nn.functional as F

    inner = wrapped_layer(module)
    down, up = (tensor.to(inner.weight.device) for tensor in (down, up))

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(down.dtype)
        if down.ndim == 4:
            small = F.conv2d(x, down, None, inner.stride, inner.padding, inner.dilation, inner.groups)
            change = F.conv2d(small, up)
        else:
            change = x @ down.T @ up.T
        return output + (scale * change).to(output.dtype)

    return add


def _spelling(layer: str, prefixes: Mapping[str, str]) -> str:
    """A layer's name as the file should have it, spelt here on its own to catch a mistake in the writer."""
    component, _, module = layer.partition(".")
    words = [prefixes[component].rstrip("_"), *module.split(".")]
    if component.startswith("text_encoder") and module.split(".")[0] in ("encoder", "embeddings", "final_layer_norm"):
        words.insert(1, "text_model")
    return "_".join(words)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], int, str]:
    """Tensors as float32, header texts, header length and the dtype of the matrices, parsed byte by byte."""
    import torch

    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        body = bytearray(data[8 + length :])
        tensors: dict[str, Tensor] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            kind = getattr(torch, _DTYPES[entry["dtype"]])
            count = (end - begin) // _WIDTH[entry["dtype"]]
            if end > len(body):
                raise ValueError(f"{name} lies behind the end of the file")
            flat = torch.frombuffer(body, dtype=kind, count=count, offset=begin)
            tensors[name] = flat.reshape(entry["shape"]).float()
        matrices = [entry["dtype"] for name, entry in header.items() if name.endswith(".weight")]
        return tensors, metadata, length, matrices[0]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise ExportError(
            f"{path}: failed: the finished file cannot be read back ({error}). Check the disk and export again."
        ) from error


def _check_keys(path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    wanted = {name + suffix for name in names for suffix in _SUFFIXES}
    missing, unknown = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing:
        raise ExportError(f"{path}: failed: {len(missing)} of {len(wanted)} keys are missing, {missing[0]} among them.")
    if unknown:
        raise ExportError(f"{path}: failed: {len(unknown)} keys belong to no trained layer, {unknown[0]} among them.")


def _compare(trained: LoRATensors, down: Tensor, up: Tensor, alpha: float) -> tuple[float, float, float]:
    """Squared Frobenius sizes of: file's change minus trained change, trained change, file's change.

    Computed on R x R products, never the full [out, in] change: |BA|^2 = sum((B'B) * (AA')).
    """
    import torch

    a, b = trained.lora_A.detach().cpu().double().flatten(1), trained.lora_B.detach().cpu().double().flatten(1)
    c, d = down.double().flatten(1), up.double().flatten(1)
    b, d = b * trained.scale, d * (alpha / down.shape[0])
    # B A - D C = (B - D) A + D (A - C); written so that equal numbers give exactly zero instead of a cancelled sum.
    left, right = torch.cat([d - b, d], dim=1), torch.cat([a, c - a], dim=0)
    return _squared(left, right), _squared(b, a), _squared(d, c)


def _squared(left: Tensor, right: Tensor) -> float:
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())
