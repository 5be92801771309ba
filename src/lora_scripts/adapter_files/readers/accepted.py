"""The names of layers that each program knows, per model: our own data, put together from the layer tables.

Which spellings a program takes was read off its source: AUTOMATIC1111 `extensions-builtin/Lora/networks.py`, Forge
`backend/patcher/lora.py`, ComfyUI `comfy/lora.py`, InvokeAI `backend/patches/lora_conversions/`, diffusers
`loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

from lora_scripts.adapter_files.owners import underscored
from lora_scripts.adapter_files.reference import ReferenceLayer, reference_layers
from lora_scripts.export.names import split_layer

__all__ = ["accepted_names"]

_TE_PREFIXES: Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    # program -> model -> component -> beginnings of kohya keys
    "a1111": {
        "sd15": {"text_encoder": ("lora_te_", "lora_te1_")},
        "sd2": {"text_encoder": ("lora_te_",)},
        "sdxl": {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)},
    },
    "comfyui": {
        "sd15": {"text_encoder": ("lora_te_", "lora_te1_")},
        "sd2": {"text_encoder": ("lora_te_", "lora_te1_")},
        "sdxl": {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)},
    },
    "invokeai": {
        "sd15": {"text_encoder": ("lora_te_",)},
        "sd2": {"text_encoder": ("lora_te_",)},
        "sdxl": {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)},
    },
    "diffusers": {
        "sd15": {"text_encoder": ("lora_te_", "lora_te1_")},
        "sd2": {"text_encoder": ("lora_te_", "lora_te1_")},
        "sdxl": {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)},
    },
}
_NO_TEXT_PROJECTION = ("a1111",)


@cache
def accepted_names(program: str, architecture: str) -> frozenset[str]:
    """Every name, without its ending, under which a program finds a layer of a model.

    Args:
        program: "a1111", "comfyui" (Forge knows the same names), "invokeai" or "diffusers".
        architecture: one of reference.ARCHITECTURES.
    """
    unet = _UNET[program]
    names: set[str] = set()
    for row in reference_layers(architecture).values():
        component, path = split_layer(row.layer)
        if component == "unet":
            names.update(unet(row, path, architecture))
        elif path != "text_projection" or program not in _NO_TEXT_PROJECTION:
            names.update(f"{prefix}{underscored(path)}" for prefix in _TE_PREFIXES[program][architecture][component])
            if program in ("comfyui", "diffusers"):
                names.add(row.layer)
    return frozenset(names)


def _a1111(row: ReferenceLayer, path: str, architecture: str) -> Iterator[str]:
    """The names of the diffusers class are turned into the original's by rules made for Stable Diffusion 1."""
    yield f"lora_unet_{underscored(row.original)}"
    first_upsampler = architecture == "sdxl" and path.startswith("up_blocks.0.upsamplers")
    if not first_upsampler and not path.startswith("add_embedding"):
        yield f"lora_unet_{underscored(path)}"


def _comfyui(row: ReferenceLayer, path: str, architecture: str) -> Iterator[str]:
    yield f"lora_unet_{underscored(row.original)}"
    yield f"lora_unet_{underscored(path)}"
    yield f"lycoris_{underscored(path)}"
    yield f"diffusion_model.{row.original}"
    processor = path.replace(".to_", ".processor.to_")
    processor = processor.removesuffix(".0") if processor.endswith(".to_out.0") else processor
    yield from (processor, f"unet.{processor}")


def _invokeai(row: ReferenceLayer, path: str, architecture: str) -> Iterator[str]:
    yield f"lora_unet_{underscored(path)}"
    if architecture == "sdxl":
        yield f"lora_unet_{underscored(row.original)}"


def _diffusers(row: ReferenceLayer, path: str, architecture: str) -> Iterator[str]:
    if not path.startswith("add_embedding"):
        yield f"lora_unet_{underscored(path)}"
    if architecture == "sdxl":
        yield f"lora_unet_{underscored(row.original)}"
    processor = path.replace(".to_", ".processor.to_").removesuffix(".0")
    yield from (path, f"unet.{path}", processor, f"unet.{processor}")


_UNET: dict[str, Callable[[ReferenceLayer, str, str], Iterator[str]]] = {
    "a1111": _a1111,
    "comfyui": _comfyui,
    "invokeai": _invokeai,
    "diffusers": _diffusers,
}
