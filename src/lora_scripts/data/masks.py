"""Masks: which parts of a picture are learnt, from its own transparency or from a second picture of the same name.

A mask goes the picture's way: turned, scaled, cropped and mirrored as it is.

Legend for shapes: H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from lora_scripts.config import Size
from lora_scripts.data.buckets import Fit
from lora_scripts.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LABEL", "ChangedMaskError", "Mask", "MaskFolder", "fitted_mask", "is_mask", "open_mask"]

LABEL = "-masklabel"
"""OneTrainer's ending of a mask that lies beside its picture."""


class ChangedMaskError(DataError):
    """The file is no longer the one that was listed."""


@dataclass(frozen=True)
class Mask:
    """Where the mask of one picture is.

    Attributes:
        kind: "alpha", the transparency of the picture itself, or "file".
        path: of the file that holds it, the picture's own for "alpha".
        digest: sha256 of that file.
        size: width and height in pixels.
    """

    kind: Literal["alpha", "file"]
    path: Path
    digest: str
    size: Size


def is_mask(name: str, stems: set[str]) -> bool:
    """Whether a picture is the mask of another one beside it; `stems` are the names of all pictures without endings."""
    stem = str(PurePosixPath(name).with_suffix(""))
    return stem.endswith(LABEL) and stem.removesuffix(LABEL) in stems


class MaskFolder:
    """Finds the masks of a folder's pictures by their names."""

    def __init__(self, pictures: Path, mask_dir: Path | None) -> None:
        """Args:
        mask_dir: where the masks are; None for masks beside the pictures, which end in `-masklabel`.
        """
        from lora_scripts.data.images import list_images

        folder = mask_dir or pictures
        self._apart = folder.resolve() != pictures.resolve()
        self._by_name: dict[str, Path] = {}
        self._by_stem: dict[str, Path] = {}
        for path in list_images(folder):
            name = path.relative_to(folder).as_posix()
            self._by_name.setdefault(name, path)
            self._by_stem.setdefault(str(PurePosixPath(name).with_suffix("")), path)
        self._used: set[Path] = set()

    def find(self, name: str) -> Path | None:
        """The mask of a picture, by its name in the folder."""
        stem = str(PurePosixPath(name).with_suffix(""))
        path = self._by_stem.get(f"{stem}{LABEL}")
        if self._apart:
            path = self._by_name.get(name) or self._by_stem.get(stem) or path
        if path is not None:
            self._used.add(path)
        return path

    @property
    def unused(self) -> list[Path]:
        """Masks in a folder of their own that no picture asked for."""
        return [path for path in self._by_name.values() if path not in self._used] if self._apart else []


def open_mask(path: Path) -> Mask:
    """A mask that is a file of its own; nothing is decoded yet.

    Raises:
        DataError: it is no picture that can be read.
    """
    from lora_scripts.data.images import image_digest, image_size

    return Mask("file", path, image_digest(path), image_size(path))


def fitted_mask(mask: Mask, fit: Fit, mirrored: bool = False) -> Tensor:
    """[1,H,W] float32 in 0..1, how much each pixel of a view is learnt: the mask scaled and cropped as the picture is.

    Of a file its lightness counts, what is transparent in it as black. Scaled with antialiasing and without overshoot.

    Raises:
        DataError: the file cannot be read; ChangedMaskError where it is no longer the one that was listed.
    """
    import numpy as np
    import torch
    from PIL.Image import Resampling, Transpose

    from lora_scripts.data.images import BLACK, image_digest, read_alpha, read_image

    image = read_alpha(mask.path) if mask.kind == "alpha" else read_image(mask.path, behind=BLACK).convert("L")
    if image is None or image_digest(mask.path) != mask.digest:
        raise ChangedMaskError(f"{mask.path}: was changed while the run was reading it.")
    if image.size != fit.scaled:
        image = image.resize(fit.scaled, Resampling.BILINEAR)
    image = image.crop((fit.left, fit.top, fit.left + fit.bucket[0], fit.top + fit.bucket[1]))
    if mirrored:
        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(image, dtype=np.uint8).copy()).float().div_(255.0).unsqueeze(0)
