"""Frozen weights of a language model cut into shards: each process holds one, and blocks are put together while they compute.

Only frozen weights are cut. The adapter is whole in every process, so the optimizer, checkpoints and the finished file know
nothing of it. A unit (the embeddings, a decoder layer, the head) is gathered from all processes before it computes, forward
and backward, and given up again afterwards.

So every pass takes all processes. In training and in measurements they make the same number of passes. Where the first
process works alone, to answer or to prove the finished file, it announces each unit before it gathers it, and the others lend
their shards: what they are needed for is not the pass itself.

Source: FSDP2, torch.distributed.fsdp.fully_shard; Zhao et al. 2023, arXiv 2304.11277, section 3, for the idea.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

__all__ = ["Shards", "shard_language_model", "sharding_saving", "unsharded_parts"]

LAYERS_AT_ONCE = 3
"""That are whole at the worst moment: the one that computes, the one that comes next, and what is on its way between processes."""
NO_MORE = -1
"""Announced in place of a unit when the first process works alone no longer."""


class Shards:
    """The units of a model whose weights lie in several processes; the same object in each of them."""

    def __init__(self, units: Sequence[FSDPModule], device: torch.device) -> None:
        """Args:
        units: cut already, in the order in which they are first asked for.
        """
        self._units, self._device = list(units), device
        self._leading = False
        for number, unit in enumerate(self._units):
            # Ahead of the hook that gathers the unit.
            _module(unit).register_forward_pre_hook(self._before_forward(number), prepend=True)

    @property
    def own_bytes(self) -> int:
        """Bytes of the shards that this process holds."""
        return sum(shard.numel() * shard.element_size() for shard in self._shards())

    @property
    def all_bytes(self) -> int:
        """Bytes of the weights that were cut, in all processes together."""
        return sum(p.numel() * p.element_size() for unit in self._units for p in _own_parameters(_module(unit)))

    def __contains__(self, module: nn.Module) -> bool:
        """Whether the module is a unit by itself."""
        return any(_module(unit) is module for unit in self._units)

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """A block within which the weights of a unit are all there, for what reads them without calling it."""
        number = next(number for number, unit in enumerate(self._units) if _module(unit) is module)
        unit = self._units[number]
        self._announce(number)
        unit.unshard()
        try:
            yield
        finally:
            unit.reshard()

    @contextmanager
    def leading(self) -> Iterator[None]:
        """A block in which the first process works alone while `lend` runs in all others; nothing may ask for gradients."""
        self._leading = True
        try:
            yield
            self._announce(NO_MORE)
        finally:
            self._leading = False

    def lend(self) -> None:
        """Gives the first process what it asks for, until it works alone no longer."""
        while (number := self._heard()) != NO_MORE:
            self._units[number].unshard()
            self._units[number].reshard()

    def recover(self) -> None:
        """Makes the model usable again after a pass that ended in an error in every process alike.

        Raises:
            ModelError: the installed torch cannot do this.
        """
        for unit in self._units:
            if not hasattr(unit, "reset_iter_state"):
                raise ModelError(
                    "shard_model: this model has to be run in a way of its own, which the installed torch cannot find out "
                    "for a model in shards. Update torch, or set shard_model: false."
                )
        self._units[0].reset_iter_state()

    def _before_forward(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._announce(number)

        return hook

    def _announce(self, number: int) -> None:
        if self._leading:
            assert not torch.is_grad_enabled() or number == NO_MORE, "a backward pass would gather unannounced"
            torch.distributed.broadcast(torch.tensor([number], device=self._device), src=0)

    def _heard(self) -> int:
        number = torch.zeros(1, dtype=torch.int64, device=self._device)
        torch.distributed.broadcast(number, src=0)
        return int(number.item())

    def _shards(self) -> Iterator[Tensor]:
        for unit in self._units:
            for parameter in _own_parameters(_module(unit)):
                yield parameter.to_local()  # type: ignore[attr-defined]


def shard_language_model(
    model: PreTrainedModel, layers: Sequence[nn.Module], name: str, device: torch.device
) -> Shards:
    """Cuts the frozen weights over all processes, unit by unit, so that the device never holds more than a shard and a unit.

    A head that is tied to the embeddings stays whole in every process, for two units cannot own one weight.

    Args:
        model: on the CPU, the same in every process; its own shard is on the device afterwards.
        layers: the decoder's, first to last.
        name: of the model, for messages.
    Raises:
        ModelError: the model is built in a way that cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not layers:
        raise ModelError(f"base_model {name}: its layers are not known, so it cannot be cut. Set shard_model: false.")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    left_whole = set(unsharded_parts(model))

    def cut(module: nn.Module) -> FSDPModule:
        return fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=left_whole)

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    try:
        blocks = [cut(layer) for layer in layers]
        ends = [cut(part) for part in (embeddings, head) if not left_whole.intersection(part.parameters())]
        rest = cut(model.base_model)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"base_model {name}: its weights cannot be cut ({str(error).splitlines()[0][:160]}). Set shard_model: false."
        ) from None
    _move_the_others(model, device)
    # What comes next in the backward pass is written down: found out as it goes, it would depend on which passes a
    # process has made without one, and the first makes more than the others.
    for before, block in zip([blocks[0], *blocks], blocks, strict=False):
        block.set_modules_to_backward_prefetch([before])
    for unit in [*ends, rest]:
        unit.set_modules_to_backward_prefetch([blocks[-1]] if unit is rest else [unit])
    return Shards([rest, *blocks, *ends], device)


def unsharded_parts(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that every process holds whole: of a head that is tied to the embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [p for p in head.parameters() if any(p is other for other in embeddings.parameters())]


def sharding_saving(model: PreTrainedModel, layers: Sequence[nn.Module], count: int) -> int:
    """Bytes in each process that so many processes save, layers that are whole for a moment taken off; needs shapes alone."""
    tied = unsharded_parts(model)
    cut = _num_bytes(model.parameters()) - _num_bytes(tied)
    at_once = LAYERS_AT_ONCE * max(_num_bytes(layer.parameters()) for layer in layers)
    ends = [] if tied else [model.get_input_embeddings(), model.get_output_embeddings()]
    at_once = max([at_once, *(2 * _num_bytes(end.parameters()) for end in ends)])
    return max(0, cut - cut // count - at_once)


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Of the frozen ones."""
    return sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)


@torch.no_grad()
def _move_the_others(model: nn.Module, device: torch.device) -> None:
    """Takes to the device what was not cut, a tied weight once."""
    for parameter in model.parameters():
        if parameter.device.type != device.type:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != device.type:
                module._buffers[key] = buffer.to(device)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Cut parameters of a unit, without those of units within it and without an adapter's."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for parameter in module._parameters.values():
        if isinstance(parameter, DTensor):
            yield parameter
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)


def _module(unit: FSDPModule) -> nn.Module:
    return cast("nn.Module", unit)  # `fully_shard` makes a module both
