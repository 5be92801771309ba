"""The change of one layer from the tensors that a kohya or LyCORIS file has of it.

Read are LoRA, LoCon and DoRA (`lora_down.weight`, `lora_up.weight`, `lora_mid.weight`, `dora_scale`), LoHa (`hada_...`),
LoKr (`lokr_...`), OFT as LyCORIS's diag-oft and kohya write it (`oft_blocks` [N, S, S], `rescale`) and whole differences (`diff`).
Not read are PEFT's packed `oft_R`: the rotation they mean has either of two signs, which only its configuration tells.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lora_scripts.adapters.loha_weights import LoHaTensors
from lora_scripts.adapters.lokr_weights import LoKrTensors
from lora_scripts.adapters.oft_weights import OFTTensors
from lora_scripts.adapters.weights import FullTensors, LayerChange, LoRATensors
from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    Parts = Mapping[str, Tensor]
    Shape = tuple[int, ...] | None

__all__ = ["change_from_parts", "kind_of_parts"]


def kind_of_parts(names: Mapping[str, object] | set[str]) -> str | None:
    """ "lora", "loha", "lokr", "oft" or "full", from the names that a file has of one layer; None for another kind."""
    return next((kind for kind, (marks, _) in _KINDS.items() if any(mark in names for mark in marks)), None)


def change_from_parts(parts: Parts, shape: Shape = None) -> LayerChange:
    """What the tensors of one layer say, in the dtype they have.

    Args:
        parts: names below the layer's to tensors. A missing `alpha` means a scale of 1 (of an OFT: no constraint).
        shape: of the layer's weight, [out, in] or [out, in, k, k], to check them by. Without it the kernel of a
            convolution is not known for the kinds that store it flat: the change is then [out, in k k].
    Raises:
        ModelError: a kind that is not read, a part missing or unknown, or shapes that do not fit; the text names the
            parts and leaves file and layer to the caller.
    """
    kind = kind_of_parts(parts)
    if kind is None:
        raise ModelError(
            f"{', '.join(sorted(parts))}: not LoRA, DoRA, LoHa, LoKr, OFT or a whole difference, so not read"
        )
    return _KINDS[kind][1](parts, shape)


def _lora(parts: Parts, shape: Shape) -> LoRATensors:
    _check_names(parts, ("lora_down.weight", "lora_up.weight"), ("lora_mid.weight", "dora_scale"))
    down, up, mid = parts["lora_down.weight"], parts["lora_up.weight"], parts.get("lora_mid.weight")
    if mid is not None:
        # down and core are two convolutions in a row without anything in between: one convolution does the same.
        _check(mid.ndim == 4 and mid.shape[1] == down.shape[0], parts)
        down = torch.einsum("ijkl,jc->ickl", mid.float(), down.float().flatten(1))
    _check(down.ndim in (2, 4) and up.ndim in (2, 4) and up.shape[1] == down.shape[0] == math.prod(up.shape[1:]), parts)
    if shape is not None:
        rank, out = down.shape[0], up.shape[0]
        _check(out == shape[0] and down.numel() == rank * math.prod(shape[1:]), parts, shape)
        down, up = down.reshape(rank, *shape[1:]), up.reshape(out, rank, *[1] * (len(shape) - 2))
    alpha = _alpha(parts, float(down.shape[0]))
    return LoRATensors(down, up, alpha, _lengths(parts, (up.shape[0], *down.shape[1:])))


def _loha(parts: Parts, shape: Shape) -> LoHaTensors:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    cores = ("hada_t1", "hada_t2") if "hada_t1" in parts or "hada_t2" in parts else ()
    _check_names(parts, (*names, *cores), ("dora_scale",))
    w1_a, w1_b, w2_a, w2_b = (parts[name] for name in names)
    _check(all(parts[name].ndim == 2 for name in names), parts)
    rank = w1_b.shape[0]
    if cores:
        _check(all(parts[name].ndim == 4 and parts[name].shape[:2] == (rank, rank) for name in cores), parts)
        _check(w1_a.shape == w2_a.shape and w1_b.shape == w2_b.shape and w1_a.shape[0] == rank, parts)
        found = (w1_a.shape[1], w1_b.shape[1], *parts["hada_t1"].shape[2:])
    else:
        _check(w1_a.shape[1] == rank and w2_a.shape[1] == w2_b.shape[0], parts)
        _check(w1_a.shape[0] == w2_a.shape[0] and w1_b.shape[1] == w2_b.shape[1], parts)
        found = (w1_a.shape[0], w1_b.shape[1])
    found = _fitting(found, shape, parts)
    alpha = _alpha(parts, float(rank))
    t1, t2 = parts.get("hada_t1"), parts.get("hada_t2")
    return LoHaTensors(w1_a, w1_b, w2_a, w2_b, alpha, found, t1, t2, _lengths(parts, found))


def _lokr(parts: Parts, shape: Shape) -> LoKrTensors:
    names: list[tuple[str, ...]] = []
    for name in ("lokr_w1", "lokr_w2"):
        names.append((name,) if name in parts else (f"{name}_a", f"{name}_b"))
    _check_names(parts, (*names[0], *names[1]), ("lokr_t2", "dora_scale"))
    w1, w2 = (tuple(parts[name] for name in factor) for factor in names)
    core = parts.get("lokr_t2")
    a, c, *_ = _outer(w1, None, parts)
    b, d, *kernel = _outer(w2, core, parts)
    found = _fitting((a * b, c * d, *kernel), shape, parts)
    _check(found[1] % c == 0, parts, shape)
    tensors = LoKrTensors(w1, w2, 0.0, found, core)
    alpha = _alpha(parts, float(tensors.rank))
    return LoKrTensors(w1, w2, alpha, found, core, _lengths(parts, found))


def _outer(factor: tuple[Tensor, ...], core: Tensor | None, parts: Parts) -> tuple[int, ...]:
    """Shape of what a factor of a LoKr makes."""
    if len(factor) == 1:
        _check(core is None and factor[0].ndim in (2, 4), parts)
        return tuple(factor[0].shape)
    a, b = factor
    _check(a.ndim == b.ndim == 2, parts)
    if core is None:
        _check(a.shape[1] == b.shape[0], parts)
        return a.shape[0], b.shape[1]
    _check(core.ndim == 4 and tuple(core.shape[:2]) == (a.shape[0], b.shape[0]), parts)
    return a.shape[1], b.shape[1], *core.shape[2:]


def _oft(parts: Parts, shape: Shape) -> OFTTensors:
    _check_names(parts, ("oft_blocks",), ("rescale",))
    blocks = parts["oft_blocks"]
    if blocks.ndim == 4:
        raise ModelError(f"oft_blocks {list(blocks.shape)}: rotations in stages (BOFT) are not read")
    _check(blocks.ndim == 3 and blocks.shape[1] == blocks.shape[2], parts)
    out = blocks.shape[0] * blocks.shape[1]
    _check(shape is None or shape[0] == out, parts, shape)
    rescale = parts.get("rescale")
    _check(rescale is None or rescale.numel() == out, parts)
    return OFTTensors(blocks, _alpha(parts, 0.0), shape or (out,), None if rescale is None else rescale.flatten())


def _full(parts: Parts, shape: Shape) -> FullTensors:
    _check_names(parts, ("diff",), ())
    diff = parts["diff"]
    _check(diff.ndim in (2, 4), parts)
    return FullTensors(diff.reshape(_fitting(tuple(diff.shape), shape, parts)))


_KINDS: dict[str, tuple[tuple[str, ...], Callable[[Parts, Shape], LayerChange]]] = {
    "lora": (("lora_down.weight", "lora_up.weight"), _lora),
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha),
    "lokr": (("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), _lokr),
    "oft": (("oft_blocks",), _oft),
    "full": (("diff",), _full),
}
"""Kind to the parts that mark it, and what reads it."""


def _alpha(parts: Parts, default: float) -> float:
    if "alpha" not in parts:
        return default
    _check(parts["alpha"].numel() == 1, parts)
    return float(parts["alpha"])


def _lengths(parts: Parts, shape: tuple[int, ...]) -> Tensor | None:
    """[out], or [1, in(, 1, 1)] where the lengths are those of input channels."""
    lengths = parts.get("dora_scale")
    if lengths is None:
        return None
    if lengths.ndim > 1 and lengths.shape[0] == 1 and lengths.numel() == shape[1] != 1:
        return lengths.reshape(1, shape[1], *[1] * (len(shape) - 2))
    _check(lengths.numel() == shape[0], parts, shape)
    return lengths.flatten()


def _fitting(found: tuple[int, ...], shape: Shape, parts: Parts) -> tuple[int, ...]:
    """The shape of the weight: as given, if what the parts make can be laid out so."""
    if shape is None:
        return found
    _check(found[0] == shape[0] and math.prod(found) == math.prod(shape), parts, shape)
    return shape


def _check_names(parts: Parts, needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in parts]
    if missing:
        raise ModelError(f"{', '.join(missing)} missing beside {', '.join(sorted(parts))}")
    unknown = sorted(set(parts) - {*needed, *optional, "alpha"})
    if unknown:
        raise ModelError(f"{', '.join(unknown)} not known beside {', '.join(needed)}")


def _check(holds: bool, parts: Parts, shape: Shape = None) -> None:
    if not holds:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(parts.items()))
        raise ModelError(f"{shapes}: do not fit {'together' if shape is None else f'a weight of {list(shape)}'}")
