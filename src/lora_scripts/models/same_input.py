"""Which linear layers of a model read the same tensor: from the table of the known kinds of attention, or by trying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["attention_groups", "watched_groups"]


def attention_groups(components: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of layers, with their component, by input: of diffusers' transformer blocks and of CLIP's text encoders.

    A block's first attention reads its own input three times, its second one takes keys and values from the caption.
    """
    groups = []
    for component, model in components.items():
        for path, module in model.named_modules():
            name = f"{component}.{path}"
            if type(module).__name__ == "BasicTransformerBlock":
                of_itself = not getattr(module, "only_cross_attention", False)
                groups.append([f"{name}.attn1.{layer}" for layer in ("to_q", "to_k", "to_v")[0 if of_itself else 1 :]])
                groups.append([f"{name}.attn2.{layer}" for layer in ("to_k", "to_v")])
            elif type(module).__name__ == "CLIPAttention":
                groups.append([f"{name}.{layer}" for layer in ("q_proj", "k_proj", "v_proj")])
    return groups


@contextmanager
def watched_groups(component: str, model: nn.Module) -> Iterator[list[list[str]]]:
    """Watches a pass within the block and fills the list: layers of one module that were given the same tensor in a row.

    A layer that is called more than once, or with something else in between, is in no group.
    """
    groups: list[list[str]] = []
    calls: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        return lambda module, inputs: calls.append((name, inputs[0]))

    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_pre_hook(watch(path)) for path, module in linear.items()]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()
    names = [name for name, _ in calls]
    for group in _runs(calls):
        if len(group) > 1 and all(names.count(each) == 1 for each in group):
            groups.append([f"{component}.{each}" for each in group])


def _runs(calls: Sequence[tuple[str, Tensor]]) -> Iterator[list[str]]:
    """The layers of each longest run of calls of one module's layers with one tensor."""
    group: list[str] = []
    before: tuple[str, Tensor] | None = None
    for name, read in calls:
        module = name.rpartition(".")[0]
        if before is not None and (before[0] != module or before[1] is not read):
            yield group
            group = []
        before = module, read
        group.append(name)
    yield group
