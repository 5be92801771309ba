"""Random changes to pictures: new looks for the autoencoder, damage for the readers.

Pictures are float [B,3,H,W] in [-1,1]. None of the looks imitates a style of the world: the styles stay unseen.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor


def _smooth_field(shape: tuple[int, int, int, int], cells: int) -> Tensor:
    coarse = torch.randn(shape[0], shape[1], cells, cells)
    return F.interpolate(coarse, size=shape[2:], mode="bicubic", align_corners=False)


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _edges(x: Tensor) -> Tensor:
    g = _grey(x)
    d = (g - F.max_pool2d(g, 3, 1, 1)).abs() + (g + F.max_pool2d(-g, 3, 1, 1)).abs()
    return (d * 2).clamp(0, 1)


def doodles(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """[count,size,size,3] uint8 random lines, polygons, ellipses and hatchings on plain grounds."""
    out = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        side = size * 2
        ground = tuple(int(v) for v in rng.integers(0, 256, 3))
        canvas = Image.new("RGB", (side, side), ground)
        pen = ImageDraw.Draw(canvas)
        for _ in range(int(rng.integers(4, 22))):
            ink = tuple(int(v) for v in rng.integers(0, 256, 3))
            kind = rng.integers(4)
            points = [tuple(p) for p in rng.uniform(-0.1, 1.1, (int(rng.integers(2, 6)), 2)) * side]
            width = int(rng.integers(2, 9))
            if kind == 0:
                pen.line(points, fill=ink, width=width, joint="curve")
            elif kind == 1 and len(points) > 2:
                pen.polygon(points, fill=ink)
            elif kind == 2:
                (x, y), r = points[0], rng.uniform(0.02, 0.25) * side
                pen.ellipse(
                    (x - r, y - r * 0.8, x + r, y + r * 0.8),
                    fill=None if rng.random() < 0.5 else ink,
                    outline=ink,
                    width=width,
                )
            else:
                x, y = points[0]
                step = float(rng.uniform(6, 16))
                for k in range(12):
                    pen.line([(x + k * step, y), (x + k * step + 20, y + 60)], fill=ink, width=max(2, width // 2))
        out[i] = np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS))
    return out


def new_looks(x: Tensor, share: float, doodle_bank: Tensor | None = None) -> Tensor:
    """Gives `share` of the pictures a look of their own: recoloured, inverted, line art, blocks, textures, doodles."""
    b, _, h, w = x.shape
    out = x.clone()
    for i in range(b):
        if torch.rand(()) >= share:
            continue
        y = x[i : i + 1]
        kind = int(torch.randint(0, 9, ()))
        if kind == 0:  # grey, tinted towards a random paper and ink
            paper, ink = torch.rand(2, 3).mul(2).sub(1).view(2, 1, 3, 1, 1)
            t = (_grey(y) + 1) / 2
            y = ink * (1 - t) + paper * t
        elif kind == 1:
            y = -y
        elif kind == 2:  # random colour mixing
            m = torch.eye(3) + torch.randn(3, 3) * 0.45
            y = torch.einsum("oc,bchw->bohw", m, y) + torch.randn(1, 3, 1, 1) * 0.25
        elif kind == 3:  # contrast and brightness
            y = y * (0.3 + 1.3 * torch.rand(())) + torch.randn(()) * 0.3
        elif kind == 4:  # lines on a ground
            e = _edges(y)
            paper, ink = torch.rand(2, 3).mul(2).sub(1).view(2, 1, 3, 1, 1)
            y = paper * (1 - e) + ink * e
            if torch.rand(()) < 0.5:
                y = 0.65 * y + 0.35 * x[i : i + 1]
        elif kind == 5:  # blocks of noise over part of the contrast
            cells = int(torch.randint(8, 40, ()))
            noise = F.interpolate(torch.rand(1, 3, cells, cells) * 2 - 1, size=(h, w), mode="nearest")
            a = 0.15 + 0.5 * torch.rand(())
            y = y * (1 - a) + noise * a
        elif kind == 6:  # smooth stains
            y = (
                y * (0.5 + 0.5 * torch.rand(()))
                + _smooth_field((1, 3 if torch.rand(()) < 0.5 else 1, h, w), int(torch.randint(3, 14, ()))) * 0.35
            )
        elif kind == 7:  # fine grain
            grain = torch.randn(1, 1, h, w)
            if torch.rand(()) < 0.5:
                grain = F.avg_pool2d(grain, 3, 1, 1) * 2
            y = y + grain * (0.05 + 0.2 * torch.rand(()))
        elif doodle_bank is not None:
            y = doodle_bank[int(torch.randint(0, len(doodle_bank), ()))][None]
            top, left = (int(torch.randint(0, n - s + 1, ())) for n, s in zip(y.shape[2:], (h, w), strict=True))
            y = y[:, :, top : top + h, left : left + w]
        out[i] = y[0].clamp(-1, 1)
    return out.contiguous(memory_format=torch.channels_last)


def jpeg(x: Tensor, low: int, high: int) -> Tensor:
    """Each picture through JPEG at a random quality in [low, high]."""
    array = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    out = np.empty(array.shape, np.uint8)
    for i, a in enumerate(array):
        buffer = io.BytesIO()
        Image.fromarray(a).save(buffer, "JPEG", quality=int(torch.randint(low, high + 1, ())))
        out[i] = np.asarray(Image.open(buffer))
    return torch.from_numpy(out).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def crop_and_resize(x: Tensor, most: float) -> Tensor:
    """Cuts up to `most` of each side's length away, at random places, and scales back."""
    b = x.shape[0]
    scale = 1 - most * torch.rand(b)
    room = 1 - scale
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, 0, 2] = (torch.rand(b) * 2 - 1) * room
    theta[:, 1, 2] = (torch.rand(b) * 2 - 1) * room
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def damage(x: Tensor, most_crop: float = 0.12) -> Tensor:
    """Crop, brightness, blur, noise and JPEG, each on part of the pictures: what a reader of attributes must survive."""
    b = x.shape[0]

    def chosen(share: float) -> Tensor:
        return (torch.rand(b) < share).view(b, 1, 1, 1)

    if most_crop:
        x = torch.where(chosen(0.6), crop_and_resize(x, most_crop), x)
    bright = ((x + 1) * (1 + 0.25 * (torch.rand(b, 1, 1, 1) * 2 - 1)) - 1).clamp(-1, 1)
    x = torch.where(chosen(0.6), bright, x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.rand(b, 1, 1, 1)
    x = torch.where(chosen(0.35), x * mix + blurred * (1 - mix), x)
    x = torch.where(chosen(0.3), (x + torch.randn_like(x) * 0.12 * torch.rand(b, 1, 1, 1)).clamp(-1, 1), x)
    picked = torch.nonzero(chosen(0.35).flatten()).flatten()
    if len(picked):
        x = x.clone()
        x[picked] = jpeg(x[picked], 40, 95)
    return x
