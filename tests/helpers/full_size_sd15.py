"""A Stable Diffusion 1.5 of the real size with random weights, in the original single-file layout."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import torch

from lora_scripts.models.sd_layout import (
    COMPONENTS,
    TEXT_PREFIX,
    ema_name,
    published_config,
    text_encoder_names,
    unet_names,
    vae_names,
)
from lora_scripts.models.single_file import schedule_tables
from lora_scripts.models.stable_diffusion import build_component

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}


def full_size_shapes() -> dict[str, tuple[int, ...]]:
    """Original name -> shape of all 1,130 weights of UNet, VAE and text encoder; no memory is taken for them."""
    name_tables = {"unet": unet_names, "vae": vae_names, "text_encoder": text_encoder_names}
    shapes = {}
    for part in COMPONENTS:
        state = build_component(part, published_config(part), "full size").state_dict()
        for name, original in name_tables[part](state).items():
            shape = tuple(state[name].shape)
            shapes[original] = (*shape, 1, 1) if ".mid.attn_1." in original and len(shape) == 2 else shape
    return shapes


def write_full_size_sd15(
    path: Path | str, dtype: torch.dtype = torch.float16, *, ema: bool = False, seed: int = 0
) -> None:
    """Writes the file (2.1 GB in fp16, 4.3 GB in fp32, 1.7 or 3.4 GB more with the UNet's running average) piece by piece.

    Matrices and kernels have variance 1 / fan-in, norms are near 1 and biases near 0, so activations stay finite in fp16.
    """
    shapes = full_size_shapes()
    tables = schedule_tables(published_config("scheduler"))
    tables[TEXT_PREFIX + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if ema:
        shapes |= {ema_name(name): shape for name, shape in shapes.items() if name.startswith("model.diffusion_model.")}
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
