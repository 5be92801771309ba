"""The first part of a key in an adapter file: which component of a model the layer belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

__all__ = ["COMPONENTS", "Spelling", "owner_of", "spelling_of", "underscored"]

Spelling = Literal["kohya", "diffusers", "peft", "native"]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "language_model")

_PREFIXES: Mapping[str, tuple[Spelling, str]] = {
    # kohya and all that write like it: the path follows with `_` for `.`
    "lora_unet_": ("kohya", "unet"),
    "oft_unet_": ("kohya", "unet"),
    "lora_transformer_": ("kohya", "transformer"),
    "lycoris_": ("kohya", "unet"),
    "lora_prior_unet_": ("kohya", "unet"),
    "lora_te_": ("kohya", "text_encoder"),
    "lora_te1_": ("kohya", "text_encoder"),
    "lora_te2_": ("kohya", "text_encoder_2"),
    "lora_te3_": ("kohya", "text_encoder_3"),
    # diffusers: the path of the module in its classes
    "unet.": ("diffusers", "unet"),
    "transformer.": ("diffusers", "transformer"),
    "text_encoder.": ("diffusers", "text_encoder"),
    "text_encoder_2.": ("diffusers", "text_encoder_2"),
    "text_encoder_3.": ("diffusers", "text_encoder_3"),
    # the original model's own paths, as ComfyUI, ai-toolkit and OneTrainer's OMI files have them
    "diffusion_model.": ("native", "unet"),
    "lora_unet.": ("native", "unet"),
    "lora_te.": ("native", "text_encoder"),
    "lora_te1.": ("native", "text_encoder"),
    "lora_te2.": ("native", "text_encoder_2"),
    "te1.": ("native", "text_encoder"),
    "te2.": ("native", "text_encoder_2"),
    "clip_l.": ("native", "text_encoder"),
    "clip_g.": ("native", "text_encoder_2"),
    "t5.": ("native", "text_encoder_3"),
}
_PEFT = "base_model.model."
_CLIP_PATH = re.compile(r"(text_model[._])?encoder[._]layers[._]")
_OLD_ATTENTION = {  # the attention processors of diffusers before 0.17 named their layers so
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}


def owner_of(base: str) -> tuple[Spelling, str | None, str]:
    """(spelling, component or None, rest of the name) of a key without its ending.

    None where the name does not say: a PEFT file names one model without telling which, as does an old UNet file.
    """
    for prefix, (spelling, component) in _PREFIXES.items():
        if base.startswith(prefix):
            rest = base.removeprefix(prefix)
            if component == "unet" and prefix == "lycoris_" and _CLIP_PATH.match(rest):
                component = "text_encoder"
            return spelling, component, rest
    if base.startswith(_PEFT):
        # A PEFT file of a whole pipeline says the component after PEFT's own words.
        rest = base.removeprefix(_PEFT)
        return ("peft", *owner_of(rest)[1:]) if rest.startswith(("unet.", "text_encoder")) else ("peft", None, rest)
    return "diffusers", None, base


def modern(component: str, path: str, *, old_ending: bool) -> str:
    """A diffusers path in today's spelling: without the attention processor that older versions had between.

    Args:
        old_ending: the key ended in `_lora.down.weight` or `_lora.up.weight`, so its last name is the processor's own.
    """
    path = path.replace(".processor.", ".")
    if old_ending:
        stem, _, last = path.rpartition(".")
        kind = "text_encoder" if component.startswith("text_encoder") else "unet"
        path = f"{stem}.{_OLD_ATTENTION[kind].get(last, last)}"
    return path


def spelling_of(found: Iterable[Spelling]) -> Spelling:
    """One word for a file: kohya where any layer is spelt so, since that decides what its readers do with it."""
    kinds = list(found)
    order: tuple[Spelling, ...] = ("kohya", "peft", "native", "diffusers")
    return next((spelling for spelling in order if spelling in kinds), "diffusers")


def underscored(path: str) -> str:
    """A path as kohya writes it, in which the names of all spellings meet."""
    return path.replace(".", "_")
