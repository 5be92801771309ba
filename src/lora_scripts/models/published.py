"""The configurations of the published Stable Diffusion models, which ship with this package as data."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

__all__ = ["published_config"]


def published_config(component: str, family: str = "sd15") -> dict[str, Any]:
    """What the published model of a family is built with.

    Args:
        component: "unet", "vae", "text_encoder", "scheduler" or "tokenizer", for "sdxl" also "text_encoder_2" and
            "tokenizer_2".
        family: "sd15", "sd2" or "sdxl".
    """
    text = files("lora_scripts.models").joinpath("assets", family, f"{component}.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config
