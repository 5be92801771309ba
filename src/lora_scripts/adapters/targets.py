"""Which layers of a model a list of layer names means.

A name matches every layer whose dotted path ends in it at a dot: `to_q` matches `down_blocks.0.attentions.0.[...].to_q`
and not `add_to_q`. The component may stand in front of a whole path: `unet.mid_block.attentions.0.proj_in`.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from torch import nn

from lora_scripts.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "LanguageTargets",
    "adaptable_layers",
    "has_layer",
    "language_model_targets",
    "match_layers",
    "short_names",
    "split_targets",
]

_NUM_NEAREST = 4


def adaptable_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of a model that can get an adapter, by dotted path: linear layers and ungrouped 2-D convolutions."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def match_layers(component: str, module: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of one component that the names mean, by dotted path, in the model's own order.

    Raises:
        TargetError: a name matches no layer; tells the nearest names and all that could be written.
    """
    layers = adaptable_layers(module)
    unmatched = [name for name in names if not any(_matches(component, path, name) for path in layers)]
    if unmatched or not names:
        raise TargetError(_explain(unmatched, names, component, short_names(layers)))
    return {path: layer for path, layer in layers.items() if any(_matches(component, path, name) for name in names)}


def has_layer(component: str, module: nn.Module, name: str) -> bool:
    """Whether the name matches a layer of the component."""
    return any(_matches(component, path, name) for path in adaptable_layers(module))


def split_targets(components: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, list[str]]:
    """The components that each name has a layer in: the mapping that `attach` takes, from one list for all of them.

    Raises:
        TargetError: a name matches no layer of any component.
    """
    paths = {component: adaptable_layers(module) for component, module in components.items()}
    targets = {
        component: [name for name in names if any(_matches(component, path, name) for path in layers)]
        for component, layers in paths.items()
    }
    unmatched = [name for name in names if not any(name in found for found in targets.values())]
    if unmatched or not names:
        known = sorted({short for layers in paths.values() for short in short_names(layers)})
        raise TargetError(_explain(unmatched, names, " or ".join(components), known))
    return {component: found for component, found in targets.items() if found}


@dataclass(frozen=True)
class LanguageTargets:
    """The layers of a language model that get an adapter when the user names none.

    Attributes:
        names: endings of their names, sorted: `down_proj`, `q_proj`, or fused ones such as `qkv_proj`.
        notes: lines for the user about weights that stay frozen.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def language_model_targets(model: nn.Module) -> LanguageTargets:
    """All linear layers but the head and whatever shares its weight with an embedding.

    A head learns a vocabulary, which readers of LoRA files do not support; layers that are no `nn.Linear` (the experts of
    most mixtures, GPT-2's Conv1D) have no adapter and are named in the notes.

    Args:
        model: a transformers model, with its head.
    Raises:
        TargetError: there is no such layer.
    """
    embeddings = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    left_out = [path for path, layer in linear.items() if layer is output or id(layer.weight) in embeddings]
    names = sorted({_unmistakable(path, left_out) for path in linear if path not in left_out})
    notes = _other_weights(model)
    if not names:
        raise TargetError(
            f"target_modules: {type(model).__name__} has no linear layer besides its head, so no adapter fits it. "
            + " ".join(notes)
        )
    return LanguageTargets(tuple(names), tuple(notes))


def _unmistakable(path: str, left_out: Sequence[str]) -> str:
    """The shortest ending of a path that is a word and matches nothing that is left out."""
    parts = path.split(".")
    for start in range(len(parts) - 1, 0, -1):
        ending = ".".join(parts[start:])
        if not parts[start].isdigit() and not any(_matches("", other, ending) for other in left_out):
            return ending
    return path


def _other_weights(model: nn.Module) -> list[str]:
    """Lines about matrices that no adapter can be put beside."""
    conv1d = sorted({_name_only(path) for path, layer in model.named_modules() if type(layer).__name__ == "Conv1D"})
    stacked = sorted({_name_only(path) for path, value in model.named_parameters() if value.ndim == 3})
    notes = []
    if conv1d:
        notes.append(f"Left frozen, as they are GPT-2's Conv1D and no linear layers: {', '.join(conv1d)}.")
    if stacked:
        notes.append(f"Left frozen, as they are stacks of experts and no linear layers: {', '.join(stacked)}.")
    return notes


def _name_only(path: str) -> str:
    return ".".join(_below_innermost_block(path).split(".")[-2:])


def short_names(paths: Iterable[str]) -> list[str]:
    """The distinct ends of layer paths below their innermost numbered block, sorted: `attn1.to_q`, `ff.net.0.proj`."""
    return sorted({_below_innermost_block(path) for path in paths})


def _matches(component: str, path: str, name: str) -> bool:
    return path == name or path.endswith("." + name) or f"{component}.{path}" == name


def _below_innermost_block(path: str) -> str:
    """`transformer_blocks.0.attn1.to_out.0` -> `attn1.to_out.0`: a block is a plural with a number behind it."""
    parts = path.split(".")
    start = 0
    for i in range(len(parts) - 2):
        if parts[i].endswith("s") and parts[i + 1].isdigit():
            start = i + 2
    return ".".join(parts[start:])


def _explain(unmatched: Sequence[str], names: Sequence[str], component: str, known: Sequence[str]) -> str:
    everything = f"See all: {', '.join(known)}"
    if not names:
        return f"target_modules: the list of layer names for {component} is empty. {everything}"
    count = f"{len(unmatched)} of {len(names)} names" if len(names) > 1 else "the name"
    verb = "matches" if len(unmatched) == 1 else "match"
    nearest = ", ".join(_nearest(unmatched, known))
    return f"target_modules: {count} {verb} no layer of {component}: {', '.join(unmatched)}. Nearest: {nearest}. {everything}"


def _nearest(unmatched: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names most like the unmatched ones: first those that share a part, then by spelling."""
    found: list[str] = []
    for name in unmatched:
        parts = {part for part in name.split(".") if not part.isdigit()}

        def likeness(candidate: str, name: str = name, parts: set[str] = parts) -> tuple[int, float]:
            return len(parts & set(candidate.split("."))), SequenceMatcher(None, name, candidate).ratio()

        ranked = sorted(known, key=likeness, reverse=True)
        found += [candidate for candidate in ranked[:2] if candidate not in found]
    return found[:_NUM_NEAREST]
