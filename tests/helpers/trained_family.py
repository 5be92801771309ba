"""A tiny family with an adapter that is not zero, and batches of two shapes, for tests of how passes are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.reference_training import load_family
from helpers.tiny_diffusion import WIDTH, save_folder, tiny_parts
from lora_scripts.adapters.lora import Adapter, AdapterForm, attach
from lora_scripts.families.latent_diffusion import UNET_ATTENTION
from lora_scripts.families.protocol import Batch

KINDS = ("lora", "dora", "loha", "lokr", "oft")


def family_with_adapter(
    folder: Path, kind: str = "lora", targets: tuple[str, ...] = UNET_ATTENTION, **changes: Any
) -> tuple[Any, Adapter]:
    """The family, and its adapter of this kind with random weights."""
    family = load_family(save_folder(tiny_parts("sd15"), folder / "model"), **changes)
    return family, random_adapter(family, {"unet": targets}, kind)


def random_adapter(family: Any, targets: Any, kind: str = "lora") -> Adapter:
    components = {name: family.components[name] for name in targets}
    adapter = attach(components, targets, seed=1, form=AdapterForm(rank=4, alpha=2.0, kind=kind))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapter


def picture_batch(name: str, width: int = 8, size: int = 2) -> Batch:
    """Latents [size,4,8,width] and embeddings that follow from the name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    tensors = {
        "latents_mean": normal(4, 8, width),
        "latents_std": normal(4, 8, width).abs(),
        "prompt_embeds": normal(7, WIDTH),
    }
    return Batch(tensors, [""] * size, [f"{name}/{row}" for row in range(size)])
