"""Optimizers by name, and their state as plain tensors and numbers.

| name | library | note |
|---|---|---|
| adamw | torch | fused kernel |
| adamw8bit | bitsandbytes | CUDA only |
| adafactor | transformers | second moments as two vectors instead of a matrix; the learning rate is absolute |
| lion | lion-pytorch | sign of the momentum; wants a third to a tenth of AdamW's learning rate |
| prodigy | prodigyopt | finds its own step size; the learning rate is a factor, usually 1 |
| adamw_schedulefree | schedulefree | averages instead of a falling learning rate; has a training and an evaluation point |

Libraries other than torch are imported when they are asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lora_scripts.errors import ConfigError, ResumeError, did_you_mean
from lora_scripts.training.ema import averages

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.optim import Optimizer

__all__ = [
    "OPTIMIZERS",
    "OptimizerName",
    "OptimizerSettings",
    "ParameterGroup",
    "effective_learning_rates",
    "evaluation_weights",
    "load_optimizer_state",
    "make_optimizer",
    "optimizer_advice",
    "optimizer_state",
    "set_learning_rates",
]

OptimizerName: TypeAlias = Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "adamw_schedulefree"]

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)

# Chosen for this machine when the optimizer is made, so a checkpoint from another machine must not bring its own.
_MACHINE_FLAGS = ("fused", "foreach", "capturable", "differentiable")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate of their own.

    Attributes:
        name: the component, "unet" or "text_encoder".
        learning_rate: the rate before the schedule's factor.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float


@dataclass(frozen=True)
class OptimizerSettings:
    """What may be set besides the learning rate; None is the optimizer's own usual value.

    Attributes:
        weight_decay: decoupled, times the learning rate; 0.01 by default, for Lion and Prodigy too.
        betas: decay of the first and second moment.
        eps: what is added to the root of the second moment.
    """

    weight_decay: float = 0.01
    betas: tuple[float, float] | None = None
    eps: float | None = None


def make_optimizer(name: str, groups: Sequence[ParameterGroup], settings: OptimizerSettings | None = None) -> Optimizer:
    """An optimizer over the groups, ready to step (schedule-free ones in training mode).

    Raises:
        ConfigError: no optimizer has that name, its library is missing, or it cannot run on this device or with two
            different learning rates.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer: {name}: no such optimizer.{did_you_mean(name, OPTIMIZERS)} Known: {', '.join(OPTIMIZERS)}."
        )
    settings = settings or OptimizerSettings()
    arguments: list[dict[str, Any]] = [
        {"params": list(g.parameters), "lr": g.learning_rate, "name": g.name, "base_lr": g.learning_rate}
        for g in groups
        if g.parameters
    ]
    options: dict[str, Any] = {"weight_decay": settings.weight_decay}
    if settings.betas is not None and name != "adafactor":
        options["betas"] = settings.betas
    if settings.eps is not None and name not in ("adafactor", "lion"):
        options["eps"] = settings.eps
    device = next(p.device for g in groups for p in g.parameters)
    match name:
        case "adamw":
            # One kernel for all parameters; the adapters are many and small, so launches are what a step costs.
            return torch.optim.AdamW(arguments, fused=device.type in ("cpu", "cuda", "mps"), **options)
        case "adamw8bit":
            return _adamw8bit(arguments, options, device)
        case "adafactor":
            return _adafactor(arguments, options)
        case "lion":
            # The foreach variant: the plain one launches seven kernels per tensor.
            lion = _library("lion_pytorch.foreach", "lion-pytorch", "lion")
            return lion.Lion(arguments, lr=groups[0].learning_rate, **options)  # type: ignore[no-any-return]
        case "prodigy":
            return _prodigy(arguments, options)
        case _:
            schedulefree = _library("schedulefree", "schedulefree", "adamw_schedulefree")
            optimizer = schedulefree.AdamWScheduleFree(arguments, **options)
            optimizer.train()
            return optimizer  # type: ignore[no-any-return]


def _adamw8bit(arguments: list[dict[str, Any]], options: dict[str, Any], device: torch.device) -> Optimizer:
    if device.type != "cuda":
        raise ConfigError(
            f"optimizer: adamw8bit runs on NVIDIA GPUs only, this run is on {device.type}. Set optimizer: adamw."
        )
    bitsandbytes = _library("bitsandbytes", "bitsandbytes", "adamw8bit")
    return bitsandbytes.optim.AdamW8bit(arguments, **options)  # type: ignore[no-any-return]


def _adafactor(arguments: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    from transformers.optimization import Adafactor

    # Steps relative to the size of the weights would never move lora_B, which starts at zero; so the rate is absolute.
    return Adafactor(  # type: ignore[no-any-return]
        arguments, scale_parameter=False, relative_step=False, warmup_init=False, **options
    )


def _prodigy(arguments: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    rates = sorted({argument["lr"] for argument in arguments})
    if len(rates) > 1:
        raise ConfigError(
            f"text_encoder_learning_rate: prodigy finds one step size for all; {rates[0]:g} and {rates[1]:g} cannot "
            "both be used. Leave text_encoder_learning_rate out, or set optimizer: adamw."
        )
    prodigy = _library("prodigyopt", "prodigyopt", "prodigy")
    # It prints a line about weight decay; the two switches are its authors' advice for diffusion models.
    with contextlib.redirect_stdout(io.StringIO()):
        return prodigy.Prodigy(  # type: ignore[no-any-return]
            arguments, use_bias_correction=True, safeguard_warmup=True, **options
        )


def _library(module: str, package: str, optimizer: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"optimizer: {optimizer} needs the package {package}, which is not installed ({error}). "
            f'Run: pip install {package} (or pip install "lora-scripts[optimizers]"), or set optimizer: adamw.'
        ) from error


def optimizer_advice(name: str, learning_rate: float, lr_scheduler: str = "cosine") -> list[str]:
    """Lines for the user when the learning rate or schedule is unusual for the optimizer; often empty."""
    advice = []
    if name == "prodigy" and learning_rate < 0.1:
        advice.append(
            f"learning_rate: {learning_rate:g} is a factor on the step size that prodigy finds by itself, so this "
            "run would hardly learn; 1.0 is usual."
        )
    if name != "prodigy" and learning_rate >= 0.01:
        hint = "5e-5" if name == "lion" else "2e-4"
        advice.append(f"learning_rate: {learning_rate:g} is high for {name}; {hint} is usual (1.0 is prodigy's).")
    elif name == "lion" and learning_rate > 1.5e-4:
        advice.append(
            f"learning_rate: {learning_rate:g} is high for lion, which moves every weight by the full rate; "
            f"a third to a tenth of AdamW's is usual, {learning_rate / 5:.0e} for instance."
        )
    if name == "adamw_schedulefree" and lr_scheduler not in ("constant", "constant_with_warmup"):
        advice.append(
            f"lr_scheduler: {lr_scheduler} and adamw_schedulefree both bring the run to rest; "
            "constant_with_warmup is usual, with one to ten times AdamW's learning rate."
        )
    return advice


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Every group's learning rate becomes its own base rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def effective_learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Each group's learning rate as it acts, by name: Prodigy's step size estimate is multiplied in."""
    return {group["name"]: float(group["lr"]) * float(group.get("d", 1.0)) for group in optimizer.param_groups}


@contextlib.contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """Within the block the parameters are those to export and preview: their average, where `training.ema` or a schedule-free
    optimizer keeps one.

    Afterwards they are, to the bit, what they were: the library's own way back rounds, and then a run with previews
    would differ from one without. A checkpoint is written outside the block.
    """
    schedule_free = any("train_mode" in group for group in optimizer.param_groups)
    averaged = averages(optimizer)
    if not schedule_free and not averaged:
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in parameters]
    if schedule_free:
        optimizer.eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter, average in averaged.items():
            parameter.copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        for group in optimizer.param_groups if schedule_free else ():
            group["train_mode"] = True


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole state: tensors for a safetensors file, and the rest as what strict JSON can hold.

    Tensors are named `POSITION.KEY`, the position counting parameters through all groups; they are not copies.
    """
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for position, state in packed["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{position}.{key}"] = value.detach().contiguous()
            else:
                numbers.setdefault(str(position), {})[key] = _to_json(value)
    groups = [{key: _to_json(value) for key, value in group.items()} for group in packed["param_groups"]]
    return tensors, {"optimizer": type(optimizer).__name__, "state": numbers, "groups": groups}


def load_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_state` returned; the next step is then the one that would have followed, to the bit.

    Raises:
        ResumeError: the state is of another optimizer, or of other parameters.
    """
    if numbers.get("optimizer") != type(optimizer).__name__:
        raise ResumeError(
            f"checkpoint: its optimizer state is of {numbers.get('optimizer')}, this run uses "
            f"{type(optimizer).__name__}. Use a new output_dir, or init_lora_weights."
        )
    current = optimizer.state_dict()["param_groups"]
    groups = [{key: _from_json(value) for key, value in group.items()} for group in numbers["groups"]]
    if [group["params"] for group in groups] != [group["params"] for group in current]:
        raise ResumeError(
            "checkpoint: its optimizer state is of another set of layers. Use a new output_dir, or init_lora_weights."
        )
    for group, own in zip(groups, current, strict=True):
        group.update({flag: own[flag] for flag in _MACHINE_FLAGS if flag in own})
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        position, _, key = name.partition(".")
        state.setdefault(int(position), {})[key] = tensor
    for position, values in numbers["state"].items():
        state.setdefault(int(position), {}).update({key: _from_json(value) for key, value in values.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _to_json(value: Any) -> Any:
    """Numbers, strings and None as they are; tuples and what JSON has no number for are marked."""
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item) for item in value]}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, Tensor):
        return {"float": value.item()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} cannot be kept in JSON"
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_from_json(item) for item in value["tuple"]) if "tuple" in value else float(value["float"])
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value
