"""What the WebUI shows on a LoRA's card: a JSON and a picture of the same name beside the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.atomic import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["sd_version", "write_preview", "write_sidecar"]


def sd_version(base_model_version: str) -> str:
    """The WebUI's name for a base model's kind: "SD1", "SD2", "SDXL" or "Unknown"."""
    kinds = {"sd_v1": "SD1", "sd_v2": "SD2", "sdxl": "SDXL"}
    return next((kind for start, kind in kinds.items() if base_model_version.startswith(start)), "Unknown")


def write_sidecar(
    lora_path: str | Path,
    *,
    base_model_version: str,
    activation_text: str = "",
    description: str = "",
    preferred_weight: float = 0.0,
    negative_text: str = "",
    notes: str = "",
) -> Path:
    """Writes `NAME.json` beside `NAME.safetensors` and returns its path.

    What the user has written into an older one is kept: only empty and missing entries are filled.

    Args:
        preferred_weight: the weight that the WebUI puts into `<lora:NAME:...>`; 0 leaves it to the WebUI's setting.
    Raises:
        DataError: the place cannot be written.
    Source: AUTOMATIC1111/stable-diffusion-webui, `extensions-builtin/Lora/ui_edit_user_metadata.py`.
    """
    path = Path(lora_path).with_suffix(".json")
    values: dict[str, object] = {
        "description": description,
        "sd version": sd_version(base_model_version),
        "activation text": activation_text,
        "preferred weight": preferred_weight,
        "negative text": negative_text,
        "notes": notes,
    }
    values.update({key: value for key, value in _existing(path).items() if value or key not in values})
    write_atomically(path, json.dumps(values, ensure_ascii=False, indent=4) + "\n")
    return path


def write_preview(lora_path: str | Path, image: Image, infotext: str = "") -> Path:
    """Writes `NAME.png` beside `NAME.safetensors`, with its prompt inside as the WebUI writes it; returns its path."""
    from lora_scripts.sampling.infotext import save_png

    path = Path(lora_path).with_suffix(".png")
    save_png(image, path, infotext)
    return path


def _existing(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
