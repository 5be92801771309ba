"""From a model on the meta device, which is all shapes, to one that can be run with fake tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["fill_with_nothing"]


def fill_with_nothing(
    module: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    images: torch.memory_format | None = None,
) -> None:
    """Gives every parameter and buffer a frozen tensor of its shape, whose numbers are whatever memory holds.

    `Module.to_empty` cannot be used within a `FakeTensorMode`, and forgets which weights are one and the same.

    Args:
        dtype: of what is a floating-point number; None keeps that of each.
        images: how tensors of four dimensions lie in memory; None for the usual way.
    """
    import torch
    from torch import nn

    made: dict[int, torch.Tensor] = {}

    def empty(like: torch.Tensor) -> torch.Tensor:
        if id(like) not in made:
            kind = dtype if dtype is not None and like.is_floating_point() else like.dtype
            form = images if images is not None and like.ndim == 4 else torch.contiguous_format
            made[id(like)] = torch.empty(like.shape, dtype=kind, device=device, memory_format=form)
            if isinstance(like, nn.Parameter):
                made[id(like)] = nn.Parameter(made[id(like)], requires_grad=False)
        return made[id(like)]

    olds = [
        *module.parameters(),
        *module.buffers(),
    ]  # alive until the end: a new tensor must not get an old one's number
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = empty(tensor)  # type: ignore[assignment]
    del olds
