"""Reading a module's tensors from files into a module on the meta device, one by one, now or when they are needed."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError
from lora_scripts.models.weights_file import WeightsHeader, read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import nn

    from lora_scripts.models.layout_names import Place
    from lora_scripts.models.reading_ahead import ReadAhead

__all__ = ["Filling"]


class Filling:
    """A module on the meta device whose names and shapes fit its files, both ways, and which can be read from them.

    Args:
        part: what the module is, for messages: "unet", "text_encoder", ...
        files: for each, name in the module -> where the file has it.
        name: of the model, for messages.
        dtype: that the module gets, at once.
        must_be_read: beginnings of names in the files that must all find a place.
    Raises:
        ModelError: names the first tensor that is missing, left over or of another shape.
    """

    def __init__(
        self,
        module: Any,
        part: str,
        files: Iterable[tuple[WeightsHeader, Mapping[str, Place]]],
        name: str,
        device: torch.device | str,
        dtype: torch.dtype,
        must_be_read: tuple[str, ...] = (),
    ) -> None:
        self._module, self._files = module, list(files)
        self._device, self._dtype = device, dtype
        self._shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        _require_match(self._shapes, self._files, part, name, must_be_read)
        _cast(module, dtype)

    def read(self, ahead: ReadAhead | None = None, images: torch.memory_format | None = None) -> None:
        """Reads every tensor into the module and freezes it.

        Args:
            ahead: where tensors may have been read already.
            images: how tensors of four dimensions lie in memory; None for the usual way.
        Raises:
            ModelError: names the first tensor that is not finite.
        """
        state = {}
        for header, places in self._files:
            users: dict[str, list[str]] = {}
            for key, place in places.items():
                users.setdefault(place.name, []).append(key)
            shapes = {place.name: place.shape_in_file(self._shapes[key]) for key, place in places.items()}
            read = ahead.tensors(header) if ahead is not None else {}
            left = [stored for stored in users if stored not in read]
            tensors = read_tensors(header, left, dtype=self._dtype, device=self._device, shapes=shapes, images=images)
            for stored, tensor in chain(read.items(), tensors):
                for key in users[stored]:
                    state[key] = places[key].taken_from(tensor.reshape(shapes[stored]))
        self._module.load_state_dict(state, strict=True, assign=True)
        _fill_buffers(self._module, self._device)
        self._module.requires_grad_(False)
        self._module.eval()


def _require_match(
    expected: Mapping[str, tuple[int, ...]],
    files: Sequence[tuple[WeightsHeader, Mapping[str, Place]]],
    part: str,
    name: str,
    must_be_read: tuple[str, ...],
) -> None:
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


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """As `module.to(dtype)`, past what libraries add to it."""
    from torch import nn

    nn.Module.to(module, dtype)


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
