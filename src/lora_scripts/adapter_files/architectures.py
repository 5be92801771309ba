"""Which model a file was made for, by its names and its header; and what it is when it is no adapter at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lora_scripts.export.names import LANGUAGE_MODEL

__all__ = ["TITLES", "architecture_by_header", "architecture_by_names", "not_an_adapter"]

TITLES: Mapping[str, str] = {
    "sd15": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
    "wan": "Wan",
    "hunyuan_video": "HunyuanVideo",
    "cascade": "Stable Cascade",
    "transformer": "a diffusion transformer",
    LANGUAGE_MODEL: "a language model",
}
"""Short name to the name that people know a model by."""

_BY_NAMES: Sequence[tuple[str, str]] = (
    # The first pattern that any layer's file name matches decides, so the rarer marks come first.
    ("cascade", r"^lora_prior_unet_"),
    ("hunyuan_video", r"individual_token_refiner"),
    ("sd3", r"joint_blocks[._]|lora_te3_"),
    ("z_image", r"noise_refiner|context_refiner|(^|\.)layers\.\d+\.attention\.(to_q|qkv)"),
    ("flux", r"double_blocks[._]|single_blocks[._]|single_transformer_blocks[._]"),
    (
        "qwen_image",
        r"transformer_blocks[._]\d+[._](img_mlp|txt_mlp|img_mod|txt_mod)|transformer_blocks\.\d+\.attn\.add_[qkv]_proj",
    ),
    ("wan", r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn)[._](q|k|v|o)$"),
    ("transformer", r"^(transformer\.|lora_transformer_|diffusion_model\.)"),
    (LANGUAGE_MODEL, r"(^|\.)(model|language_model)\.layers\.\d+\.|(^|\.)transformer\.h\.\d+\.|gpt_neox\.layers"),
)
_HEADER = (
    ("sdxl", ("sdxl", "stable-diffusion-xl")),
    ("sd3", ("sd3", "stable-diffusion-3")),
    ("sd2", ("sd_v2", "stable-diffusion-v2")),
    ("sd15", ("sd_v1", "stable-diffusion-v1", "sd_1.5", "sd1")),
    ("flux", ("flux",)),
    ("qwen_image", ("qwen",)),
    ("z_image", ("zimage", "z-image", "z_image")),
    ("wan", ("wan",)),
)
_NOT_ADAPTERS = {
    "model.diffusion_model.": "a whole model; give it as base_model, not as a LoRA",
    "cond_stage_model.": "a whole model; give it as base_model, not as a LoRA",
    "conditioner.": "a whole model; give it as base_model, not as a LoRA",
    "first_stage_model.": "a whole model; give it as base_model, not as a LoRA",
    "model.layers.": "a whole language model; give it as base_model, not as a LoRA",
    "emb_params": "a textual-inversion embedding, not a LoRA",
    "clip_l": "a textual-inversion embedding, not a LoRA",
    "clip_g": "a textual-inversion embedding, not a LoRA",
    "control_model.": "a ControlNet, not a LoRA",
    "controlnet_": "a ControlNet, not a LoRA",
    "decoder.": "a VAE or another whole network, not a LoRA",
    "down_blocks.": "a whole U-Net; give its folder as base_model, not as a LoRA",
}
_SHOWN = 5


def architecture_by_header(metadata: Mapping[str, str]) -> str | None:
    """What the header says that the file was made for; None where it does not say."""
    version = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture", "")
    version = version.lower()
    if metadata.get("ss_v2") == "True" and not version:
        return "sd2"
    return next((name for name, marks in _HEADER if any(mark in version for mark in marks)), None)


def architecture_by_names(bases: Iterable[str]) -> str | None:
    """The model that layer names without their endings belong to; None where no mark is known."""
    bases = list(bases)
    for name, pattern in _BY_NAMES:
        mark = re.compile(pattern)
        if any(mark.search(base) for base in bases):
            return name
    return None


def not_an_adapter(keys: Iterable[str]) -> str:
    """What a file without any adapter in it is, as the end of a sentence that begins with its path."""
    keys = list(keys)
    for start, what in _NOT_ADAPTERS.items():
        if any(key.startswith(start) for key in keys):
            return f"is {what}."
    shown = ", ".join(keys[:_SHOWN]) or "nothing"
    return f"is not a LoRA: none of its tensors is a pair of low-rank matrices. It holds {shown}."
