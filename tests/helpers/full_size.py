"""A Stable Diffusion of the real size, of any family, with random weights, in the original single-file layout."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch

from lora_scripts.models.components import build_component
from lora_scripts.models.published import published_config
from lora_scripts.models.sd_layout import LAYOUTS
from lora_scripts.models.single_file import schedule_tables
from lora_scripts.models.unet_layout import UNET_PREFIX, ema_name

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def full_size_shapes(family: str = "sd15") -> dict[str, tuple[int, ...]]:
    """Original name -> shape of all weights of U-Net, VAE and text encoders; no memory is taken for them."""
    layout, shapes = LAYOUTS[family], {}
    for part in layout.components:
        state = build_component(part, published_config(part, family), "full size").state_dict()
        for name, place in layout.places(part, state).items():
            shape = place.shape_in_file(tuple(state[name].shape))
            shapes[place.name] = (*shape, 1, 1) if ".mid.attn_1." in place.name and len(shape) == 2 else shape
    for text in layout.texts.values():
        if text.penultimate:  # real files hold the last layer too, which nothing reads
            read = [name for name in shapes if name.startswith(text.prefix + "transformer.resblocks.0.")]
            last = sum(name.endswith(".ln_1.bias") for name in shapes)
            shapes |= {name.replace(".resblocks.0.", f".resblocks.{last}."): shapes[name] for name in read}
            width = shapes[text.prefix + "ln_final.bias"][0]
            shapes[text.prefix + "text_projection"] = (width, width)
    return shapes


def write_full_size(
    path: Path | str, family: str, dtype: torch.dtype = torch.float16, *, ema: bool = False, seed: int = 0
) -> None:
    """Writes the file piece by piece: the model is never in memory.

    In 16 bits Stable Diffusion 1.5 takes 2.1 GB (1.7 GB more with the U-Net's running average), SDXL 6.9 GB.

    Matrices and kernels have variance 1 / fan-in, norms are near 1 and biases near 0, so activations stay finite in fp16.
    """
    shapes = full_size_shapes(family)
    tables = schedule_tables(published_config("scheduler", family))
    for text in LAYOUTS[family].texts.values():
        if not text.open_clip:
            tables[text.prefix + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if ema:
        shapes |= {ema_name(name): shape for name, shape in shapes.items() if name.startswith(UNET_PREFIX)}
    # One block of normal numbers, read from another place for each tensor: drawing a billion takes half a minute.
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(1 << 24, generator=generator)

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, table in tables.items():
        header[name], position = _entry(_DTYPES[table.dtype], tuple(table.shape), position, table.element_size())
    for name, shape in shapes.items():
        header[name], position = _entry(_DTYPES[dtype], shape, position, dtype.itemsize)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for table in tables.values():
            file.write(table.contiguous().view(torch.uint8).numpy().data)
        for index, (name, shape) in enumerate(shapes.items()):
            values = _random(shape, name, block, offset=index * 7919 * 64)
            file.write(values.to(dtype).flatten().view(torch.uint8).numpy().data)


def _entry(dtype: str, shape: tuple[int, ...], position: int, item_bytes: int) -> tuple[dict[str, object], int]:
    end = position + math.prod(shape) * item_bytes
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}, end


def _random(shape: tuple[int, ...], name: str, block: torch.Tensor, offset: int) -> torch.Tensor:
    count = math.prod(shape)
    offset %= len(block)
    copies = -(-(offset + count) // len(block))
    values = block.repeat(copies)[offset : offset + count] if copies > 1 else block[offset : offset + count]
    if len(shape) > 1:
        scale = 0.02 if "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))
        return (values * scale).reshape(shape)
    norm_weight = name.endswith("weight")
    return values * 0.01 + (1.0 if norm_weight else 0.0)
