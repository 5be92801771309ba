"""Where a run computes, and in which number format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lora_scripts.models.source import BaseModel
    from lora_scripts.training.chosen import Chosen

__all__ = ["choose_device", "choose_dtype", "describe_device"]

SMALL_MODEL_BYTES = 200e6
"""Weights below this compute faster in float32 on a CPU: conversions cost more than half-precision kernels save."""


def choose_device(name: str) -> torch.device:
    """The device behind auto, cuda, cuda:1, mps or cpu.

    Raises:
        ConfigError: no such device here.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name}: no such device. Write auto, cuda, cuda:1, mps or cpu.") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        have = f"{torch.cuda.device_count()} found" if torch.cuda.is_available() else "this torch sees no CUDA GPU"
        raise ConfigError(f"device: {name}: is not there ({have}). Set device: auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: mps: is not there. Set device: auto.")
    return device


def choose_dtype(
    config: RunConfig, device: torch.device, source: BaseModel, began: Chosen | None = None
) -> torch.dtype:
    """The number format of the frozen weights: bf16 where the device has it, else fp16 on a GPU, else fp32.

    Args:
        began: of the run that is resumed; auto goes on with its format wherever the device can train in it.
    """
    import torch

    if config.mixed_precision != "auto":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.mixed_precision]
        if dtype is torch.float16 and device.type == "cpu":
            raise ConfigError("mixed_precision: fp16 does not train on a CPU. Set bf16, fp32 or auto.")
        return dtype
    if began is not None and (began.dtype is not torch.float16 or device.type != "cpu"):
        return began.dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    weights = source.path.stat().st_size if source.path.is_file() else _folder_bytes(source)
    return torch.bfloat16 if native and weights > SMALL_MODEL_BYTES else torch.float32


def describe_device(device: torch.device) -> str:
    """The device's name for people: `NVIDIA GeForce RTX 4070 (12 GB)`, or the number of CPU threads."""
    import platform

    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} ({properties.total_memory / 2**30:.0f} GB)"
    if device.type == "mps":
        return "Apple GPU (mps)"
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def _folder_bytes(source: BaseModel) -> int:
    return sum(path.stat().st_size for path in source.path.rglob("*.safetensors"))
