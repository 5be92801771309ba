"""What a reader does with a file, in words."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from lora_scripts.adapter_files.endings import KINDS

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = [
    "TO_KOHYA",
    "TO_PLAIN",
    "Reader",
    "Verdict",
    "half_a_layer",
    "left_out",
    "refused_kind",
    "unknown_layers",
    "wrong_strength",
]

TO_KOHYA = "lora-scripts convert FILE --to kohya --output NEW.safetensors"
TO_PLAIN = "lora-scripts bake FILE --output NEW.safetensors"
_SHOWN = 3


@dataclass(frozen=True)
class Verdict:
    """Whether a program reads a file whole and shows it where it should.

    Attributes:
        reader: the program's name.
        ok: True only if every layer acts as trained.
        reason: what goes wrong, or what to know; may be empty when all is well.
        way_on: what to do about it; empty when all is well.
    """

    reader: str
    ok: bool
    reason: str = ""
    way_on: str = ""


class Reader(Protocol):
    """A program that loads LoRA files of Stable Diffusion 1, 2 and SDXL."""

    title: ClassVar[str]

    def takes(self, file: AdapterFile) -> Verdict:
        """The verdict on a file whose architecture is one of reference.ARCHITECTURES."""
        ...


def refused_kind(reader: str, file: AdapterFile, kinds: Collection[str]) -> Verdict | None:
    """A verdict where a layer is of a kind that the program does not know."""
    others = [kind for kind in file.kinds if kind not in kinds]
    if not others:
        return None
    names = " and ".join(KINDS[kind] for kind in others)
    return Verdict(reader, False, f"it does not know {names}", f"turn it into a plain LoRA: {TO_PLAIN}")


def half_a_layer(reader: str, file: AdapterFile) -> Verdict | None:
    """A verdict where a layer lacks one of its matrices."""
    if not file.faults:
        return None
    return Verdict(reader, False, "it stops at a layer that lacks some of its tensors", "export the file again")


def wrong_strength(reader: str, file: AdapterFile) -> Verdict | None:
    """A verdict of a program that looks for alpha only beside the tensors, and takes a missing one for scale 1."""
    layers = file.layers.values()
    if not any("alpha" not in layer.parts and layer.rank and layer.alpha not in (None, layer.rank) for layer in layers):
        return None
    reason = "alpha stands outside its tensors, where it does not look, so the strength would be wrong"
    return Verdict(reader, False, reason, f"put alpha beside the tensors: {TO_KOHYA}")


def unknown_layers(file: AdapterFile, accepted: Collection[str]) -> list[str]:
    """The layers' names in the file that a program has no layer for; keys that belong to nothing are among them."""
    return [layer.file_name for layer in file.layers.values() if layer.file_name not in accepted] + [
        key for key in file.strangers if not key.startswith("bundle_emb")
    ]


def left_out(reader: str, file: AdapterFile, unknown: list[str]) -> Verdict:
    """The verdict on layers that a program passes over in silence."""
    count = len(file.layers) + len([key for key in file.strangers if not key.startswith("bundle_emb")])
    shown = ", ".join(unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
    if len(unknown) == count:
        reason = f"it knows none of the {count} names: {shown}"
    else:
        reason = f"it leaves out {len(unknown)} of {count} layers whose names it does not know: {shown}"
    return Verdict(reader, False, reason, f"write the names anew: {TO_KOHYA}")
