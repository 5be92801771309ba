"""Where the weights of the built-in models lie.

They ship inside the package, in `builtin/data/`. The environment variable LORA_SCRIPTS_BUILTIN_DIR names another folder
of the same layout, for models that `tools/make_builtin` has just made.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_scripts.errors import ModelError, did_you_mean

__all__ = ["BUILTIN_NAMES", "PREFIX", "builtin_path", "is_builtin"]

PREFIX = "builtin:"

BUILTIN_NAMES: tuple[str, ...] = ("mini-sd", "mini-clip", "mini-blip", "mini-blip-itm", "mini-llama", "judges")
"""Folders, in the layouts that diffusers and transformers load; `judges` holds our own classifiers."""


def is_builtin(name: str) -> bool:
    """Whether a model's name asks for a built-in one, such as "builtin:mini-sd"."""
    return name.startswith(PREFIX)


def builtin_path(name: str) -> Path:
    """The folder of a built-in model.

    Args:
        name: one of `BUILTIN_NAMES`, with or without "builtin:" in front.
    Raises:
        ModelError: there is no built-in model of that name, or its weights are not installed.
    """
    short = name.removeprefix(PREFIX)
    if short not in BUILTIN_NAMES:
        raise ModelError(f"{name}: there is no such built-in model.{did_you_mean(short, BUILTIN_NAMES)}")
    chosen = os.environ.get("LORA_SCRIPTS_BUILTIN_DIR")
    root = Path(chosen) if chosen else Path(__file__).parent / "data"
    folder = root / short
    if not folder.is_dir():
        raise ModelError(
            f"{PREFIX}{short}: its weights are not at {folder}. Install the package again, or make them with "
            "tools/make_builtin and name their folder in LORA_SCRIPTS_BUILTIN_DIR."
        )
    return folder
