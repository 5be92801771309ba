"""Frozen blocks that live in the computer's memory and visit the device while they compute.

A block's weights are copied into one of two buffers on the device while the block before it computes, forward and backward.
Frozen weights never change, so nothing is copied back. Block number n always uses buffer n mod 2 at the same addresses: its
parameters point there for good, and what autograd keeps of a weight is right again as soon as the block is back.

Where the device is a CPU the buffers are memory like any other and the copies wait for nothing: the same code, without a gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_scripts.errors import ConfigError

__all__ = ["BlockSwap", "swap_blocks", "swap_saving", "swapped_places"]

NUM_BUFFERS = 2
"""One holds the block that computes, the other the one that comes next."""
ALIGNMENT = 256
"""Bytes; kernels read whole rows of them at once."""


def swap_blocks(blocks: Sequence[nn.Module], count: int, device: torch.device) -> None:
    """Makes so many of the blocks visitors; a model on another device can then be moved without them.

    Args:
        blocks: in the order in which they compute; all parameters are frozen.
        count: 0 for none.
    Raises:
        ConfigError: there are fewer blocks.
    """
    if count:
        BlockSwap([blocks[place] for place in swapped_places(len(blocks), count)], device)


def swapped_places(num_blocks: int, count: int) -> list[int]:
    """Which blocks are swapped: spread evenly, so that those which stay hide the copying of those which do not.

    Raises:
        ConfigError: there are fewer blocks.
    """
    if count > num_blocks:
        raise ConfigError(f"block_swap: {count}: this model has {num_blocks} blocks that can be swapped.")
    return [(2 * number + 1) * num_blocks // (2 * count) for number in range(count)]


def swap_saving(blocks: Sequence[nn.Module], count: int) -> int:
    """Bytes on the device that so many swapped blocks save, their buffers taken off; needs shapes alone."""
    if not count:
        return 0
    sizes = [_layout(_frozen(blocks[place]))[1] for place in swapped_places(len(blocks), count)]
    return max(0, sum(sizes) - sum(_buffer_sizes(sizes)))


class BlockSwap:
    """Brings blocks to the device in time; at work from when it is made, by hooks on the blocks."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        parameters = [_frozen(block) for block in blocks]
        layouts = [_layout(each) for each in parameters]
        self._buffers = [
            torch.zeros(size, dtype=torch.uint8, device=device) for size in _buffer_sizes([size for _, size in layouts])
        ]
        self._held: list[int | None] = [None] * len(self._buffers)
        self._ready: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._homes: list[Tensor] = []
        self._backward_of = -1
        for number, (block, own, (offsets, size)) in enumerate(zip(blocks, parameters, layouts, strict=True)):
            home = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)  # pinned memory a GPU fetches by itself
            buffer = self._buffers[number % len(self._buffers)]
            for parameter, offset in zip(own, offsets, strict=True):
                _part(home, parameter, offset).copy_(parameter.data)
                parameter.data = _part(buffer, parameter, offset)
            self._homes.append(home)
            block.register_forward_pre_hook(self._before_forward(number), with_kwargs=True)
            block.register_forward_hook(self._after_forward(number))

    def _before_forward(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any]) -> None:
            if not _is_outline([*inputs, *more.values()]):
                # Checkpointing calls a block again within its backward pass: then the one before it comes next.
                self._use(number, -1 if number == self._backward_of else 1)

        return hook

    def _after_forward(self, number: int) -> Any:
        def before_backward(grad: Tensor) -> None:
            self._backward_of = number
            self._use(number, -1)

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for tensor in outputs:
                if isinstance(tensor, Tensor) and tensor.requires_grad and not _is_outline([tensor]):
                    tensor.register_hook(before_backward)  # type: ignore[no-untyped-call]

        return hook

    def _use(self, number: int, direction: int) -> None:
        """Has the block in its buffer for what is computed from now on, and sends for the next one."""
        self._bring(number)
        ready = self._ready[number % len(self._buffers)]
        if ready is not None:
            torch.cuda.current_stream(self._device).wait_event(ready)
        if direction > 0:
            self._backward_of = -1
        if 0 <= number + direction < len(self._homes):
            self._bring(number + direction)

    def _bring(self, number: int) -> None:
        place = number % len(self._buffers)
        if self._held[place] == number:
            return
        self._held[place] = number
        home = self._homes[number]
        buffer = self._buffers[place][: home.numel()]
        if self._stream is None:
            buffer.copy_(home)
            return
        # All that was started so far may still read what the buffer holds.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(home, non_blocking=True)
            self._ready[place] = self._stream.record_event()


def _frozen(block: nn.Module) -> list[nn.Parameter]:
    """The block's frozen weights, in their order; what is trained stays on the device."""
    return [p for p in block.parameters() if not p.requires_grad and p.is_contiguous()]


def _layout(parameters: Sequence[nn.Parameter]) -> tuple[list[int], int]:
    """Where each parameter begins in the block's bytes, and how many these are."""
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        num_bytes = parameter.numel() * parameter.element_size()
        end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _buffer_sizes(sizes: Sequence[int]) -> list[int]:
    """Of each buffer: the largest block that uses it."""
    return [max(sizes[first::NUM_BUFFERS]) for first in range(min(NUM_BUFFERS, len(sizes)))]


def _part(whole: Tensor, parameter: nn.Parameter, offset: int) -> Tensor:
    num_bytes = parameter.numel() * parameter.element_size()
    return whole[offset : offset + num_bytes].view(parameter.dtype).view(parameter.shape)


def _is_outline(values: Sequence[Any]) -> bool:
    """Whether a pass is only planned, with tensors that have no content: then nothing may be copied."""
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(value, FakeTensor) for value in values)
