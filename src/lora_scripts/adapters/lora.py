"""LoRA layers and the adapter that puts them into a frozen model.

Legend for shapes: R rank, N rows (batch times positions), in/out features or channels, k kernel size.
Source: Hu et al. 2021, arXiv 2106.09685; scale as PEFT and kohya's sd-scripts, initial values as either.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.adapters.low_rank import linear_low_rank
from lora_scripts.adapters.resize import fit_rank
from lora_scripts.adapters.targets import match_layers
from lora_scripts.adapters.weights import LoRATensors, LoRAWeights
from lora_scripts.errors import ConfigError, ModelError, ResumeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["Adapter", "LoRAConv2d", "LoRAInit", "LoRALinear", "attach"]

LoRAInit = Literal["gaussian", "kaiming"]


class _LoRALayer(nn.Module):
    """A frozen layer with a trainable low-rank change; takes the place of the layer in its parent.

    Attributes:
        base: the layer as it was, frozen.
        lora_A, lora_B: float32 whatever the dtype of the base; used in the dtype of the input.
        alpha: numerator of the scale.
        strength: 1 in training; another value for previews, 0 switches the change off.
    """

    base: nn.Linear | nn.Conv2d
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.strength = rank, alpha, dropout, 1.0
        weight = base.weight
        shape_a, shape_b = [rank, *weight.shape[1:]], [weight.shape[0], rank, *[1] * (weight.ndim - 2)]
        self.lora_A = nn.Parameter(torch.empty(shape_a, dtype=torch.float32, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(shape_b, dtype=torch.float32, device=weight.device))
        # A subclass (a quantised layer, say) may multiply in its own way: then it is called as it is.
        self._plain = type(base) is nn.Linear

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        """The frozen weight: model code asks a layer for its dtype and device this way."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @torch.no_grad()
    def reset(self, generator: torch.Generator, init: LoRAInit = "gaussian") -> None:
        """Draws lora_A and clears lora_B, so that the layer starts as its base.

        Args:
            init: "gaussian": normal, spread 1 / R, as PEFT's option of that name and diffusers' scripts;
                "kaiming": uniform with a = sqrt 5, PEFT's default and kohya's.
        """
        drawn = torch.empty(self.lora_A.shape)
        if init == "gaussian":
            drawn.normal_(0.0, 1.0 / self.rank, generator=generator)
        else:
            bound = 1.0 / math.sqrt(self.lora_A[0].numel())
            drawn.uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _LoRALayer:
        # model.half() or .to(torch.bfloat16) must not round the trained weights; they follow the device alone.
        self.base._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in (self.lora_A, self.lora_B):
            parameter.data = parameter.data.to(fn(parameter.data).device)
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(parameter.device)
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


class LoRALinear(_LoRALayer):
    """x W^T + b + alpha / R * dropout(x) A^T B^T; x [..., in], A [R, in], B [out, R]."""

    base: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        base, scale = self.base, self.scale * self.strength
        if scale == 0.0:
            return base(x)  # type: ignore[no-any-return]
        dropping = self.training and self.dropout > 0.0
        hooked = base._forward_hooks or base._forward_pre_hooks
        if self._plain and not (dropping or hooked or torch.is_autocast_enabled(x.device.type)):
            return linear_low_rank(x, base.weight, base.bias, self.lora_A, self.lora_B, scale)
        low = F.linear(F.dropout(x, self.dropout, dropping), self.lora_A.to(x.dtype))
        return torch.add(base(x), F.linear(low, self.lora_B.to(low.dtype)), alpha=scale)


class LoRAConv2d(_LoRALayer):
    """conv(x, W) + b + alpha / R * conv1x1(conv(dropout(x), A), B); x [N, in, h, w], A [R, in, k, k], B [out, R, 1, 1].

    A has the stride, padding and dilation of the base. A product of our own was measured and is no faster here.
    """

    base: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        base, scale = self.base, self.scale * self.strength
        if scale == 0.0:
            return base(x)  # type: ignore[no-any-return]
        dropping = self.training and self.dropout > 0.0
        low = base._conv_forward(F.dropout(x, self.dropout, dropping), self.lora_A.to(x.dtype), None)
        return torch.add(base(x), F.conv2d(low, self.lora_B.to(low.dtype)), alpha=scale)


class Adapter:
    """All LoRA layers that were put into a family's components.

    Attributes:
        layers: component and dotted path to layer, in the model's order: `unet.mid_block.[...].to_q`.
    """

    def __init__(self, layers: Mapping[str, _LoRALayer], places: Mapping[str, tuple[nn.Module, str]]) -> None:
        self.layers = dict(layers)
        self._places = dict(places)
        self._parameters = [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`unet.[...].to_q.lora_A` and so on with their parameters."""
        for name, layer in self.layers.items():
            yield f"{name}.lora_A", layer.lora_A
            yield f"{name}.lora_B", layer.lora_B

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, float32, in the model's order."""
        return list(self._parameters)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by component, for a learning rate of each."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(name.partition(".")[0], []).extend((layer.lora_A, layer.lora_B))
        return groups

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self._parameters)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def scale_grads(self, factor: float) -> None:
        """Multiplies every gradient; what has none is left alone."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if grads and factor != 1.0:
            torch._foreach_mul_(grads, factor)

    def zero_grad(self) -> None:
        """Drops every gradient."""
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def strength(self, strength: float) -> Iterator[None]:
        """Within the block the change counts `strength` times, as in `<lora:NAME:0.7>`, and dropout is off."""
        before = [(layer.strength, layer.training) for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.strength, layer.training = strength, False
        try:
            yield
        finally:
            for layer, (old_strength, old_training) in zip(self.layers.values(), before, strict=True):
                layer.strength, layer.training = old_strength, old_training

    def disabled(self) -> Any:
        """A block within which the model is as it was before `attach`."""
        return self.strength(0.0)

    def detach(self) -> None:
        """Puts the original layers back; the model is exactly as before `attach`, its layers still frozen."""
        for name, layer in self.layers.items():
            parent, child = self._places[name]
            if parent._modules.get(child) is layer:
                setattr(parent, child, layer.base)

    def weights(self) -> dict[str, LoRATensors]:
        """Copies of the trained tensors, float32 on the CPU, by component and layer path."""
        return {
            name: LoRATensors(_copy(layer.lora_A), _copy(layer.lora_B), layer.alpha)
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def load_weights(self, weights: LoRAWeights, *, strict: bool = True) -> list[str]:
        """Starts from a finished LoRA, for incremental training; another scale is folded in, another rank fitted.

        Args:
            strict: refuse weights for layers that this adapter lacks; else they are left out, with a message.
        Returns:
            Messages for the user: layers left as they were, weights left out, ranks changed.
        Raises:
            ModelError: nothing fits, a shape differs, or (strict) a layer is not there.
        """
        extra = [name for name in weights if name not in self.layers]
        missing = [name for name in self.layers if name not in weights]
        if len(missing) == len(self.layers):
            raise ModelError(
                f"init_lora_weights: none of its {len(weights)} layers is among the {len(self.layers)} that train "
                f"here. It has {_some(list(weights))}; wanted {_some(list(self.layers))}. Is it for another model?"
            )
        if extra and strict:
            raise ModelError(
                f"init_lora_weights: {len(extra)} of its {len(weights)} layers do not train here: {_some(extra)}. "
                "Add them to target_modules (or set train_text_encoder: true when they are the text encoder's)."
            )
        messages = []
        if extra:
            messages.append(f"init_lora_weights: {_layers(extra)} that do not train here left out: {_some(extra)}.")
        if missing:
            messages.append(f"init_lora_weights: not in it, so starting new, {_layers(missing)}: {_some(missing)}.")
        fitted = {}
        for name, tensors in weights.items():
            if name in self.layers:
                _check_shape(name, tensors, self.layers[name])
                fitted[name] = fit_rank(tensors, self.layers[name].rank)
        for name, (tensors, _) in fitted.items():
            layer = self.layers[name]
            rank = tensors.rank
            # Rows of A beyond the loaded rank keep their drawn values with a B of zero: no effect yet, but they learn.
            layer.lora_A[:rank].copy_(tensors.lora_A)
            layer.lora_B.zero_()
            layer.lora_B[:, :rank].copy_(tensors.lora_B.double().mul_(tensors.scale / layer.scale))
        messages += _rank_messages({name: weights[name].rank for name in fitted}, self.layers, fitted)
        return messages

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters' own tensors by name, for a checkpoint."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to a checkpoint of this same adapter, to the bit.

        Raises:
            ResumeError: the names or shapes differ.
        """
        own = dict(self.named_parameters())
        if own.keys() != state.keys():
            raise ResumeError(
                "checkpoint: its layers are not those of this run: "
                f"{_some(sorted(own.keys() ^ state.keys()))}. Use a new output_dir, or init_lora_weights."
            )
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise ResumeError(
                    f"checkpoint: {name} is {list(state[name].shape)}, this run has {list(parameter.shape)}. "
                    "Use a new output_dir, or init_lora_weights."
                )
            parameter.copy_(state[name])


def attach(
    components: Mapping[str, nn.Module],
    targets: Mapping[str, Sequence[str]],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    seed: int = 0,
    init: LoRAInit = "gaussian",
) -> Adapter:
    """Puts a LoRA layer in the place of every targeted layer and returns the handle on all of them.

    The initial values of a layer depend on the seed and its name alone, so they stay the same whatever else is
    targeted. The layers' own weights are frozen; the rest of the model is left as it is.

    Args:
        components: component name to module, as `ModelFamily.components`.
        targets: component name to endings of layer names.
        rank: R, for every layer.
        alpha: the scale is alpha / rank.
        dropout: share of the inputs of A that is zeroed in training.
        init: how A begins, see `LoRALinear.reset`; B begins at zero.
    Raises:
        TargetError: a name matches no layer.
        ConfigError: the rank is larger than a layer can use, or a component is unknown.
    """
    unknown = [component for component in targets if component not in components]
    if unknown:
        raise ConfigError(f"target_modules: no component {unknown[0]!r}; this model has {', '.join(components)}.")
    adapted = [c for c in targets for module in components[c].modules() if isinstance(module, _LoRALayer)]
    assert not adapted, f"{adapted[0]} has an adapter already; detach it first"
    matched = {component: match_layers(component, components[component], names) for component, names in targets.items()}
    found = {f"{component}.{path}": layer for component, layers in matched.items() for path, layer in layers.items()}
    _check_rank(rank, found)
    layers: dict[str, _LoRALayer] = {}
    places: dict[str, tuple[nn.Module, str]] = {}
    for name, base in found.items():
        component, _, path = name.partition(".")
        parent_path, _, child = path.rpartition(".")
        parent = components[component].get_submodule(parent_path)
        kind = LoRAConv2d if isinstance(base, nn.Conv2d) else LoRALinear
        layer = kind(base, rank, alpha, dropout)
        layer.reset(_generator(seed, name), init)
        setattr(parent, child, layer)
        layers[name], places[name] = layer, (parent, child)
    return Adapter(layers, places)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}\0lora\0{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _check_rank(rank: int, layers: Mapping[str, nn.Module]) -> None:
    if rank < 1:
        raise ConfigError(f"lora_rank: {rank} is not a rank; use 1 or more, 8 is a good start.")
    sizes = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        sizes[name] = min(weight.shape[0], weight[0].numel())
    too_small = [name for name, size in sizes.items() if size < rank]
    if too_small:
        smallest = min(too_small, key=sizes.__getitem__)
        others = f" (nor can {_layers(too_small[1:], 'other ')})" if len(too_small) > 1 else ""
        raise ConfigError(
            f"lora_rank: {rank} is more than {smallest} can use{others}; the largest possible rank here is "
            f"{sizes[smallest]}. Lower lora_rank, or leave the layer out of target_modules."
        )


def _check_shape(name: str, tensors: LoRATensors, layer: _LoRALayer) -> None:
    theirs = (tensors.lora_B.shape[0], *tensors.lora_A.shape[1:])
    if theirs != tuple(layer.base.weight.shape):
        raise ModelError(
            f"init_lora_weights: {name} changes a weight of {list(theirs)}, the model has "
            f"{list(layer.base.weight.shape)}. The file is for another model."
        )


def _rank_messages(
    ranks: Mapping[str, int], layers: Mapping[str, _LoRALayer], fitted: Mapping[str, tuple[LoRATensors, float]]
) -> list[str]:
    """One message for each pair of old and new rank; names how much of the change was kept."""
    pairs: dict[tuple[int, int], list[float]] = {}
    for name, old in ranks.items():
        if old != layers[name].rank:
            pairs.setdefault((old, layers[name].rank), []).append(fitted[name][1])
    return [
        f"init_lora_weights: {_layers(kept)} of rank {old} "
        + (
            f"extended to rank {new}, nothing lost."
            if new > old
            else f"cut to rank {new} by SVD, "
            f"{100 * sum(kept) / len(kept):.1f} % of their change kept (squared, on average)."
        )
        for (old, new), kept in pairs.items()
    ]


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _layers(items: Sequence[object], kind: str = "") -> str:
    return f"{len(items)} {kind}layer{'' if len(items) == 1 else 's'}"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
