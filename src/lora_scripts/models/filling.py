"""Reading a module's tensors from files into a module on the meta device, one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError
from lora_scripts.models.weights_file import WeightsHeader, read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import nn

    from lora_scripts.models.layout_names import Place

__all__ = ["fill"]


def fill(
    module: Any,
    part: str,
    files: Iterable[tuple[WeightsHeader, Mapping[str, Place]]],
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    must_be_read: tuple[str, ...] = (),
) -> None:
    """Reads a module's tensors into it, every name matched both ways, then freezes it.

    Args:
        part: what the module is, for messages: "unet", "text_encoder", ...
        files: for each, name in the module -> where the file has it.
        name: of the model, for messages.
        must_be_read: beginnings of names in the files that must all find a place.
    Raises:
        ModelError: names the first tensor that is missing, left over, of another shape or not finite.
    """
    files = list(files)
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {
        key: (header.tensors[place.name], place)
        for header, places in files
        for key, place in places.items()
        if place.name in header.tensors
    }
    missing = [key for key in expected if key not in found]
    left_over = [key for key in found if key not in expected]
    for header, places in files:
        used = {place.name for place in places.values()}
        left_over += [key for key in header.tensors if key.startswith(must_be_read) and key not in used]
    if missing or left_over:
        what = (
            f"{len(missing)} tensors are missing, first {missing[0]}"
            if missing
            else f"{len(left_over)} tensors fit nowhere, first {left_over[0]}"
        )
        raise ModelError(
            f"{name}: the {part} does not match its configuration: {what}. The file is incomplete or of another model: use the original download."
        )
    for key, (info, place) in found.items():
        wanted = place.shape_in_file(expected[key])
        if _without_ones(info.shape) != _without_ones(wanted):
            raise ModelError(
                f"{name}: the {part}'s {key} has shape {list(info.shape)}, expected {list(wanted)}. The configuration belongs to another model."
            )
    state = {}
    for header, places in files:
        users: dict[str, list[str]] = {}
        for key, place in places.items():
            users.setdefault(place.name, []).append(key)
        shapes = {places[key].name: places[key].shape_in_file(expected[key]) for key in places}
        for stored, tensor in read_tensors(header, users, dtype=dtype, device=device, shapes=shapes):
            for key in users[stored]:
                state[key] = places[key].taken_from(tensor)
    module.load_state_dict(state, strict=True, assign=True)
    _fill_buffers(module, device)
    module.requires_grad_(False)
    module.eval()


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution's shape as that of the linear layer which computes the same."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _fill_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Gives memory to what is not in any file: CLIP's position numbers 0, 1, 2, ..."""
    import torch

    for owner in module.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                assert key == "position_ids", f"a buffer that nothing fills: {key}"
                owner.register_buffer(
                    key, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape), persistent=False
                )
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
