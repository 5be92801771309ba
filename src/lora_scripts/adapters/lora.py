"""The adapter: trainable layers put into a frozen model, and the handle on all of them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_scripts.adapters.blocks import check_blocks
from lora_scripts.adapters.dense import dense_weight
from lora_scripts.adapters.kinds import AdapterForm, AdapterKind
from lora_scripts.adapters.layer import AdapterLayer, at_strength, weight_shape
from lora_scripts.adapters.layers import LoRAConv2d, LoRAInit, LoRALinear
from lora_scripts.adapters.same_input import SameInput, can_group
from lora_scripts.adapters.targets import match_layers
from lora_scripts.adapters.weights import LayerChange, LayerChanges
from lora_scripts.errors import ConfigError, ModelError, ResumeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

__all__ = ["Adapter", "AdapterForm", "AdapterKind", "LoRAConv2d", "LoRAInit", "LoRALinear", "attach"]


class Adapter:
    """All trainable layers that were put into a family's components.

    Attributes:
        layers: component and dotted path to layer, in the model's order: `unet.mid_block.[...].to_q`.
        block_rates: learning rates of blocks (see `adapters.blocks`) in place of their component's; empty at first.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], places: Mapping[str, tuple[nn.Module, str]]) -> None:
        self.layers = dict(layers)
        self.block_rates: Mapping[str, float] = {}
        self._places = dict(places)
        self._parameters = [p for layer in self.layers.values() for p in layer.trained().values()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`unet.[...].to_q.lora_A` and so on with their parameters."""
        for name, layer in self.layers.items():
            for kind, parameter in layer.trained().items():
                yield f"{name}.{kind}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, float32, in the model's order."""
        return list(self._parameters)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by component, for a learning rate of each."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, layer in self.layers.items():
            groups.setdefault(name.partition(".")[0], []).extend(layer.trained().values())
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

    def compute_together(self, groups: Sequence[Sequence[str]], *, joined: bool) -> int:
        """Has layers that read the same input computed together, as far as their kind allows; how many groups there are now.

        Args:
            groups: names of layers, trained here or not, each group in the order in which they are called.
            joined: the frozen weights are one product too; see `adapters.same_input`.
        """
        count = 0
        for names in groups:
            layers = [layer for name in names if type(layer := self.layers.get(name)) is LoRALinear]
            if len(layers) > 1 and all(can_group(layer, layers[0]) for layer in layers):
                group = SameInput(layers, joined=joined)
                for layer in layers:
                    layer.group = group
                count += 1
        return count

    def strength(self, strength: float) -> AbstractContextManager[None]:
        """A block within which the change counts `strength` times, as in `<lora:NAME:0.7>`, and dropout is off."""
        return at_strength(self.layers.values(), strength)

    def disabled(self) -> AbstractContextManager[None]:
        """A block within which the model is as it was before `attach`."""
        return self.strength(0.0)

    def detach(self) -> None:
        """Puts the original layers back; the model is exactly as before `attach`, its layers still frozen."""
        for name, layer in self.layers.items():
            parent, child = self._places[name]
            if parent._modules.get(child) is layer:
                setattr(parent, child, layer.base)

    def weights(self) -> dict[str, LayerChange]:
        """Copies of what was trained, float32 on the CPU, by component and layer path.

        PiSSA is stated as the plain LoRA that changes the original model as it does, at twice the rank; a DoRA has its
        magnitudes with it; the other kinds have tensors of their own.
        """
        return {name: layer.tensors() for name, layer in self.layers.items()}

    def base_weight(self, name: str) -> Tensor:
        """The frozen weight of a layer, float32 on its device: the change of a DoRA or an OFT depends on it."""
        return dense_weight(self.layers[name].base)

    @torch.no_grad()
    def load_weights(self, weights: LayerChanges, *, strict: bool = True, left_out: Sequence[str] = ()) -> list[str]:
        """Starts from a finished LoRA, for incremental training; another scale is folded in, another rank fitted.

        Args:
            strict: refuse weights for layers that this adapter lacks; else they are left out, with a message.
            left_out: further layers of the file, which were not read because this adapter lacks them.
        Returns:
            Messages for the user: layers left as they were, weights left out, ranks changed.
        Raises:
            ModelError: nothing fits, a shape differs, or (strict) a layer is not there.
        """
        extra = [*left_out, *(name for name in weights if name not in self.layers)]
        missing = [name for name in self.layers if name not in weights]
        if len(missing) == len(self.layers):
            raise ModelError(
                f"init_lora_weights: none of its {len(extra)} layers is among the {len(self.layers)} that train "
                f"here. It has {_some(extra)}; wanted {_some(list(self.layers))}. Is it for another model?"
            )
        if extra and strict:
            raise ModelError(
                f"init_lora_weights: {len(extra)} of its {len(weights) + len(left_out)} layers do not train here: {_some(extra)}. "
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
                try:
                    fitted[name] = self.layers[name].fitted(tensors)
                except ModelError as error:
                    raise ModelError(
                        f"init_lora_weights: {name} {error}. adapter: lora, locon or dora goes on from any kind; as an entry "
                        "of base_loras the file stays as it is."
                    ) from error
        for name, (tensors, _) in fitted.items():
            self.layers[name].start_from(tensors)
        messages += _rank_messages(
            {name: weights[name].rank for name in fitted if weights[name].kind == "lora"}, self.layers, fitted
        )
        return messages

    def state_dict(self) -> dict[str, Tensor]:
        """The layers' own tensors by name, for a checkpoint: parameters, and what else a layer must remember."""
        return {f"{name}.{key}": value for name, layer in self.layers.items() for key, value in layer.state().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to a checkpoint of this same adapter, to the bit.

        Raises:
            ResumeError: the names or shapes differ.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ResumeError(
                "checkpoint: its layers are not those of this run: "
                f"{_some(sorted(own.keys() ^ state.keys()))}. Use a new output_dir, or init_lora_weights."
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ResumeError(
                    f"checkpoint: {name} is {list(state[name].shape)}, this run has {list(tensor.shape)}. "
                    "Use a new output_dir, or init_lora_weights."
                )
            tensor.copy_(state[name])


def attach(
    components: Mapping[str, nn.Module],
    targets: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
    form: AdapterForm | None = None,
    **settings: Any,
) -> Adapter:
    """Puts a trainable layer in the place of every targeted layer and returns the handle on all of them.

    The initial values of a layer depend on the seed and its name alone, so they stay the same whatever else is
    targeted. The layers' own weights are frozen; the rest of the model is left as it is.

    Args:
        components: component name to module, as `ModelFamily.components`.
        targets: component name to endings of layer names.
        form: kind, ranks and scales; or its fields as keywords, rank and alpha at least.
    Raises:
        TargetError: a name matches no layer, or a block has none.
        ConfigError: the rank is larger than a layer can use, a component is unknown, kind and init do not go together, or
            every layer is left out.
    """
    form = form or AdapterForm(**settings)
    unknown = [component for component in targets if component not in components]
    if unknown:
        raise ConfigError(f"target_modules: no component {unknown[0]!r}; this model has {', '.join(components)}.")
    adapted = [c for c in targets for module in components[c].modules() if isinstance(module, AdapterLayer)]
    assert not adapted, f"{adapted[0]} has an adapter already; detach it first"
    matched = {component: match_layers(component, components[component], names) for component, names in targets.items()}
    found = {f"{component}.{path}": layer for component, layers in matched.items() for path, layer in layers.items()}
    check_blocks("block_ranks", form.block_ranks, found)
    form.check(found)
    found = {name: base for name, base in found.items() if form.rank_of(name, base) > 0}
    if not found:
        raise ConfigError("block_ranks: every layer is left out. Give a block a rank above 0.")
    layers: dict[str, AdapterLayer] = {}
    places: dict[str, tuple[nn.Module, str]] = {}
    for name, base in found.items():
        component, _, path = name.partition(".")
        parent_path, _, child = path.rpartition(".")
        parent = components[component].get_submodule(parent_path)
        layer = form.make(name, base)
        layer.reset(_generator(seed, name), form.init)
        setattr(parent, child, layer)
        layers[name], places[name] = layer, (parent, child)
    return Adapter(layers, places)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}\0lora\0{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _check_shape(name: str, change: LayerChange, layer: AdapterLayer) -> None:
    ours = weight_shape(layer.base)
    if change.shape != ours:
        raise ModelError(
            f"init_lora_weights: {name} changes a weight of {list(change.shape)}, the model has {list(ours)}. "
            "The file is for another model."
        )


def _rank_messages(
    ranks: Mapping[str, int], layers: Mapping[str, AdapterLayer], fitted: Mapping[str, tuple[LayerChange, float]]
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


def _layers(items: Sequence[object], kind: str = "") -> str:
    return f"{len(items)} {kind}layer{'' if len(items) == 1 else 's'}"


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
