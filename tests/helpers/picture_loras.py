"""LoRA files for pictures of the real layers' shapes, written by the program's own writer, and ways to break them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_scripts.adapter_files.reference import kohya_names, reference_layers
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.export.metadata import RunFacts, file_metadata
from lora_scripts.export.writer import write_lora
from lora_scripts.models.weights_file import inspect_weights

VERSIONS = {
    "sd15": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}


def facts(architecture: str, **changes: object) -> RunFacts:
    version, spec = VERSIONS[architecture]
    values: dict[str, object] = {
        "output_name": "ink",
        "base_model_version": version,
        "modelspec_architecture": spec,
        "rank": 2,
        "alpha": 3.0,
        "is_v2": architecture == "sd2",
    }
    return RunFacts(**{**values, **changes})  # type: ignore[arg-type]


def lora_weights(
    architecture: str, *, text_encoders: bool = True, convolutions: bool = False, uneven: bool = False
) -> dict[str, LoRATensors]:
    """Random weights of every attention layer, with `convolutions` of every layer that files have a place for.

    `uneven` gives each layer one of two ranks and one of three alphas. alpha is never the rank.
    """
    torch.manual_seed(0)
    weights = {}
    for number, (name, row) in enumerate(reference_layers(architecture).items()):
        chosen = ("attn" in name) if not convolutions else bool(row.kohya)
        if not chosen or (not text_encoders and name.startswith("text_encoder")):
            continue
        rank, alpha = (1 + number % 2, 0.5 + number % 3) if uneven else (2, 3.0)
        ones = [1] * (len(row.shape) - 2)
        down, up = torch.randn(rank, *row.shape[1:]), torch.randn(row.shape[0], rank, *ones)
        weights[name] = LoRATensors(down.half(), up.half(), alpha)
    return weights


def write_ours(path: Path, architecture: str, **options: bool) -> Path:
    """The file as a finished run writes it."""
    weights = lora_weights(architecture, **options)
    texts = file_metadata(facts(architecture))
    write_lora(path, weights, texts, torch.float16, kohya_names(architecture))
    return path


def rewritten(
    path: Path,
    to: Path,
    change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A copy with other tensors or another header."""
    texts = inspect_weights(path).metadata if metadata is None else metadata
    save_file(dict(change(load_file(path))), to, dict(texts))
    return to
