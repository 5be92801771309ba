"""Whether frozen layers multiply in 8 bits in a run, and in which kind: what the setting comes to on its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lora_scripts.devices import choose_device
from lora_scripts.errors import ConfigError
from lora_scripts.speed_rules import low_bit_obstacles

if TYPE_CHECKING:
    import torch

    from lora_scripts.config import RunConfig
    from lora_scripts.models.low_bit import LowBit
    from lora_scripts.training.events import Events

__all__ = ["choose_low_bit", "low_bit_kind", "require_low_bit"]

FP8_CAPABILITY, INT8_CAPABILITY = (8, 9), (7, 5)
"""Compute capability from which on CUDA devices multiply in that kind: Ada and Hopper, Turing."""
INSTALL = 'pip install "lora-scripts[lowbit]"'


def choose_low_bit(config: RunConfig, events: Events) -> RunConfig:
    """The config with a kind, or none, in place of `low_bit_matmul: auto`; a run that is resumed goes on as it began.

    Raises:
        ConfigError: torchao is not installed, or the device cannot do what was written.
    """
    from lora_scripts.training.chosen import Chosen

    written = config.low_bit_matmul
    if written == "none":
        return config
    device = choose_device(config.device)
    if written != "auto":
        require_low_bit(written, device)
        if device.type == "cpu" and written == "fp8":
            events.note("low_bit_matmul: fp8: a CPU has no such products and makes them up, several times slower.")
        return config
    began = Chosen.read(config.output_dir)
    kind = began.low_bit if began is not None else _fastest(config, device)
    if kind != "none":
        try:
            require_low_bit(kind, device)
        except ConfigError as error:
            if began is not None:
                raise
            events.note(f"Frozen layers multiply plainly. ({error})")
            kind = "none"
    return config.model_copy(update={"low_bit_matmul": kind})


def low_bit_kind(config: RunConfig) -> LowBit | None:
    """The kind in a config; None where there is none, or it was not chosen yet."""
    return None if config.low_bit_matmul in ("none", "auto") else cast("LowBit", config.low_bit_matmul)


def _fastest(config: RunConfig, device: torch.device) -> str:
    """On a CUDA GPU the kind that it is built for; a CPU gains too little to be worth the rounding."""
    import torch

    if device.type != "cuda" or low_bit_obstacles(config):
        return "none"
    capability = torch.cuda.get_device_capability(device)
    if capability >= FP8_CAPABILITY and torch.version.hip is None:
        return "fp8"
    return "int8" if capability >= INT8_CAPABILITY else "none"


def require_low_bit(kind: str, device: torch.device) -> None:
    """Tries a small layer of that kind on the device, forward and backward.

    Raises:
        ConfigError: torchao is not installed, or this cannot be done here.
    """
    import torch

    if device.type == "cuda" and torch.version.hip is None:
        needed, cards = {"fp8": (FP8_CAPABILITY, "Ada, Hopper"), "int8": (INT8_CAPABILITY, "Turing")}[kind]
        found = torch.cuda.get_device_capability(device)
        if found < needed:
            other = "int8, auto" if kind == "fp8" and found >= INT8_CAPABILITY else "auto"
            raise ConfigError(
                f"low_bit_matmul: {kind}: needs a GPU of compute capability {needed[0]}.{needed[1]} ({cards}) or above; "
                f"this one has {found[0]}.{found[1]}. Set {other} or none."
            )
    try:
        _try_out(kind, device)
    except ImportError as error:
        raise ConfigError(
            f"low_bit_matmul: {kind} needs the package torchao, which is not installed or another version ({error}). "
            f"Run: {INSTALL}, or set low_bit_matmul: none."
        ) from error
    except Exception as error:  # missing kernels show in many ways
        reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
        raise ConfigError(
            f"low_bit_matmul: {kind}: cannot be done on {device} here ({reason}). Set low_bit_matmul: auto or none."
        ) from error


def _try_out(kind: str, device: torch.device) -> None:
    import torch

    from lora_scripts.models.low_bit import low_bit_linear, low_bit_weight

    weight = low_bit_weight(torch.eye(32, 64, device=device), cast("LowBit", kind))
    x = torch.ones(3, 64, device=device, requires_grad=True)
    low_bit_linear(x, weight, None).sum().backward()  # type: ignore[no-untyped-call]
    if x.grad is None or not bool(x.grad.isfinite().all()):
        raise RuntimeError("no finite gradient comes back")
