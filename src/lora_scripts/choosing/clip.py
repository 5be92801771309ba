"""The CLIP that compares pictures with pictures and texts: named by the user, found on this machine, or the built-in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_scripts.captioners.folders import CLIP, ModelFolder, check_folder, find_model, first_available

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from lora_scripts.config import RunConfig

__all__ = ["Embedder", "find_clip"]

BUILTIN = "builtin:mini-clip"


def find_clip(config: RunConfig) -> ModelFolder | None:
    """The folder of the CLIP that `clip_model` names, complete; None where none is wanted.

    Cheap, so it is asked before the training that the model will judge.

    Raises:
        ModelError: it is not on this machine, incomplete, or no CLIP.
    """
    if config.keep == "last" or config.clip_model == "none":
        return None
    if config.clip_model == "auto":
        found, _ = first_available(CLIP)
        return found or find_model(BUILTIN, CLIP)
    folder = find_model(config.clip_model, CLIP)
    check_folder(folder, CLIP)
    return folder


class Embedder:
    """Embeddings [B,D] on the CPU, float32, of length one."""

    batch_size = 16

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        """Raises ModelError when the folder cannot be loaded."""
        import torch

        from lora_scripts.captioners.clip_rerank import ClipRanker
        from lora_scripts.captioners.folders import quiet_libraries

        quiet_libraries()
        self._clip = ClipRanker(folder, device, torch.float32)
        self.name = folder.name

    def images(self, images: Sequence[Image]) -> Tensor:
        """Of pictures of any size."""
        import torch

        prepared = [self._clip.prepare(image.convert("RGB")) for image in images]
        starts = range(0, len(prepared), self.batch_size)
        return torch.cat([self._clip.embed_images(prepared[i : i + self.batch_size]).cpu() for i in starts])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Of texts; what a text holds beyond the model's limit is not read."""
        import torch

        starts = range(0, len(texts), self.batch_size)
        return torch.cat([self._clip.embed_texts(texts[i : i + self.batch_size]).cpu() for i in starts])
