"""Frozen weights in 4 or 8 bits through bitsandbytes (QLoRA): whether that runs here, loading them, what they take.

Source: Dettmers et al. 2023, arXiv 2305.14314, section 3, for NF4 and double quantisation.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lora_scripts.errors import ConfigError
from lora_scripts.models.language_model import load_language_model

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Quantization", "load_quantised", "num_weights", "require_quantisation", "settle_layers", "stored_bytes"]

Quantization = Literal["nf4", "int8"]


def load_quantised(
    folder: Path, name: str, dtype: torch.dtype, device: torch.device, kind: Quantization
) -> PreTrainedModel:
    """The frozen model on the device, in evaluation mode, each weight quantised there as soon as it is read.

    The head and the embeddings keep their dtype, as transformers decides for every architecture.

    Args:
        folder, name: as for `load_language_model`.
        dtype: that the layers compute in, and of what is not quantised.
    Raises:
        ConfigError: bitsandbytes is not installed, or cannot do this here; no weight was read.
        ModelError: as for `load_language_model`.
    """
    from transformers import BitsAndBytesConfig

    require_quantisation(kind, device, dtype)
    how = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if kind == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    model = load_language_model(folder, name, dtype, quantization_config=how, device_map={"": device})
    settle_layers(model)
    return model


def require_quantisation(kind: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    """Tries a small layer on the device, forward and backward.

    Raises:
        ConfigError: bitsandbytes is not installed, or cannot do this here.
    """
    try:
        _bitsandbytes()
        _try_out(kind, device, dtype)
    except ImportError as error:
        raise ConfigError(
            f"quantization: {kind} needs the package bitsandbytes, which is not installed ({error}). "
            'Run: pip install "lora-scripts[quant]", or set quantization: none.'
        ) from error
    except Exception as error:  # a library that was built for another CUDA fails in many ways
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        raise ConfigError(
            f"quantization: {kind}: the installed bitsandbytes cannot do this on {device} ({reason}). "
            "Install a newer one: pip install -U bitsandbytes; or use another device, or quantization: none."
        ) from error


def settle_layers(model: nn.Module) -> None:
    """Makes quantised layers compute in one way, whether they train or answer."""
    bitsandbytes = _bitsandbytes()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            # On some CPUs its first pass without gradients would pack the weight anew, for good and without a backward pass.
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            model.set_submodule(name, _int8(layer))


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, with what bitsandbytes keeps beside packed weights (scales and tables)."""
    import torch

    tensors = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [value for value in state.as_dict().values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def num_weights(module: nn.Module) -> int:
    """Numbers in all parameters; packed ones count as what they stand for."""
    states = [(parameter, getattr(parameter, "quant_state", None)) for parameter in module.parameters()]
    return sum(parameter.numel() if state is None else math.prod(state.shape) for parameter, state in states)


def _int8(layer: Any) -> nn.Module:
    """The same numbers in a layer that rounds nothing but the weight."""
    from lora_scripts.models.int8_linear import Int8Linear

    weight = layer.weight
    return Int8Linear(weight.data, weight.SCB.float() / 127, None if layer.bias is None else layer.bias.data)


def _try_out(kind: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    import torch

    bitsandbytes = _bitsandbytes()
    model = torch.nn.Sequential(
        bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
        if kind == "nf4"
        else bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    ).to(device)
    settle_layers(model)
    x = torch.ones(2, 64, device=device, dtype=dtype, requires_grad=True)
    model(x).sum().backward()
    if x.grad is None or not bool(x.grad.isfinite().all()):
        raise RuntimeError("no finite gradient comes back")


def _bitsandbytes() -> Any:
    # What it says of inputs and kernels is not for users, and comes once for every layer and step.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with _no_kernels_from_the_hub():
        import bitsandbytes

    return bitsandbytes


@contextmanager
def _no_kernels_from_the_hub() -> Iterator[None]:
    """While imported, bitsandbytes may fetch a kernel through the package `kernels`; nothing is downloaded here unasked."""
    missing = object()
    before = sys.modules.get("kernels", missing)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's way to make an import fail
    try:
        yield
    finally:
        if before is missing:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]
