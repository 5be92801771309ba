"""The last part of a key in an adapter file: what the tensor is for its layer, and what kind of adapter the layer has.

Every trainer spells the same tensors its own way. Inside the program they go by kohya's and LyCORIS's names, the only
spelling that has a name for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from math import prod

__all__ = ["KINDS", "PEFT_ENDINGS", "Shape", "kind_of", "rank_of", "shape_of", "split_key"]

Shape = tuple[int, ...]

_LORA = {
    ".lora_down.weight": "lora_down.weight",
    ".lora_up.weight": "lora_up.weight",
    ".lora_mid.weight": "lora_mid.weight",
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_A": "lora_down.weight",
    ".lora_B": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora_linear_layer.down.weight": "lora_down.weight",
    ".lora_linear_layer.up.weight": "lora_up.weight",
    "_lora.down.weight": "lora_down.weight",
    "_lora.up.weight": "lora_up.weight",
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
}
_LYCORIS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("oft_blocks", "oft_diag", "rescale", "diff", "diff_b", "scalar", "on_input", "w_norm", "b_norm"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
)
_ENDINGS = {**_LORA, **{f".{name}": name for name in _LYCORIS}}
_BY_LENGTH = sorted(_ENDINGS, key=len, reverse=True)

PEFT_ENDINGS = (".lora_A", ".lora_B", ".lora_magnitude_vector")
"""What PEFT calls its tensors; a key with one of these holds no alpha of its own."""

_NAMED_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector)|\.(?:hada|lokr)_\w+)\.default(?=\.|$)")

KINDS: Mapping[str, str] = {
    "lora": "LoRA",
    "dora": "DoRA",
    "tucker": "LoRA with a Tucker core",
    "loha": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "full": "full difference",
    "glora": "GLoRA",
    "ia3": "(IA)^3",
    "norm": "change of a norm layer",
    "unknown": "unknown kind",
}
"""Kind of a layer's adapter, to the name that people know it by."""


def split_key(key: str) -> tuple[str, str]:
    """("unet.x.to_q", "lora_down.weight") from "unet.x.to_q.lora_A.weight"; an unknown ending gives part "" and the key."""
    plain = _NAMED_ADAPTER.sub(r"\1", key)
    for ending in _BY_LENGTH:
        if plain.endswith(ending):
            return plain.removesuffix(ending), _ENDINGS[ending]
    return key, ""


def kind_of(parts: Collection[str]) -> str:
    """A key of KINDS from the parts that a layer has; "unknown" where nothing tells."""
    for kind, marks in (
        ("loha", "hada_"),
        ("lokr", "lokr_"),
        ("oft", "oft_"),
        ("glora", ("a1.", "a2.", "b1.", "b2.")),
        ("ia3", "on_input"),
        ("norm", ("w_norm", "b_norm")),
    ):
        if any(part.startswith(marks) for part in parts):
            return kind
    if "lora_down.weight" in parts or "lora_up.weight" in parts:
        if "dora_scale" in parts:
            return "dora"
        return "tucker" if "lora_mid.weight" in parts else "lora"
    return "full" if "diff" in parts or "diff_b" in parts else "unknown"


def rank_of(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """The rank that the shapes of a layer's tensors tell; None where the kind has none (a full matrix, a rotation)."""
    if kind in ("lora", "dora", "tucker"):
        return _first(shapes.get("lora_down.weight"))
    if kind == "loha":
        return _first(shapes.get("hada_w1_b"))
    if kind == "lokr":
        return _first(shapes.get("lokr_w2_b") or shapes.get("lokr_w1_b"))
    return None


def shape_of(kind: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the weight that a layer's tensors change, [out, in] or [out, in, k, k]; None where they do not tell.

    A LoHa without Tucker core flattens its kernel, so that of a convolution is [out, in * k * k].
    """
    if kind in ("lora", "dora", "tucker"):
        down, up, mid = (shapes.get(f"lora_{name}.weight") for name in ("down", "up", "mid"))
        if not down or not up or len(down) < 2:
            return None
        return (up[0], down[1], *(mid[2:] if mid else down[2:]))
    if kind == "loha" and "hada_w1_a" in shapes and "hada_w1_b" in shapes:
        w_a, w_b, core = shapes["hada_w1_a"], shapes["hada_w1_b"], shapes.get("hada_t1")
        return (w_a[1], w_b[1], *core[2:]) if core else (w_a[0], w_b[1])
    if kind == "lokr":
        left = _factor(shapes, "lokr_w1")
        right = _factor(shapes, "lokr_w2")
        return (left[0] * right[0], left[1] * right[1], *right[2:]) if left and right else None
    return shapes.get("diff") if kind == "full" else None


def _factor(shapes: Mapping[str, Shape], name: str) -> Shape | None:
    whole, a, b, core = (shapes.get(f"{name}{end}") for end in ("", "_a", "_b", ""))
    core = shapes.get("lokr_t2") if name == "lokr_w2" else None
    if whole:
        return whole
    if not a or not b:
        return None
    return (a[1], b[1], *core[2:]) if core else (a[0], prod(b[1:]))


def _first(shape: Shape | None) -> int | None:
    return shape[0] if shape else None
