"""Our networks as those of diffusers and transformers, for what those libraries do with them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import diffusers
import transformers
from torch import nn

from lora_scripts.models.stable_diffusion import StableDiffusionParts

__all__ = ["library_network", "library_parts"]


def library_network(network: Any) -> Any:
    """The library's class of that name with the same configuration and weights; one of a library's own stays as it is."""
    kind = type(network)
    if not kind.__module__.startswith("lora_scripts."):
        return network
    if hasattr(diffusers, kind.__name__):
        other = getattr(diffusers, kind.__name__).from_config(dict(network.config))
    else:
        other = getattr(transformers, kind.__name__)(transformers.CLIPTextConfig.from_dict(dict(network.config)))
    nn.Module.to(other, network.dtype)
    other.load_state_dict(network.state_dict())
    return other.requires_grad_(False).eval()


def library_parts(parts: StableDiffusionParts) -> StableDiffusionParts:
    """All networks of a model as the libraries'; they must have been read."""
    networks = [field.name for field in fields(parts) if isinstance(getattr(parts, field.name), nn.Module)]
    return replace(parts, **{name: library_network(getattr(parts, name)) for name in networks})
