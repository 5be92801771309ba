"""What every training here shares: the clock that ends it, averaged weights, curves, snapshots."""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from scenes import DEFAULT_WORK
from torch import Tensor, distributed, nn


def arguments(description: str, minutes: float, **extra: Any) -> argparse.Namespace:
    """The command line shared by all trainings; `extra` adds --name options with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder of data, models, curves and pictures")
    parser.add_argument("--data", type=Path, default=None, help="work folder to read the data from (default: --work)")
    parser.add_argument("--minutes", type=float, default=minutes, help="time budget; the learning rate follows it")
    parser.add_argument("--resume", action="store_true", help="continue from the last snapshot")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--team", type=int, default=1, help="processes that train together, each given its --rank")
    parser.add_argument("--rank", type=int, default=0)
    for name, default in extra.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default)
    given = parser.parse_args()
    given.data = given.data or given.work
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)  # denormal numbers in young gradients are many times slower on a CPU
    torch.manual_seed(given.seed)
    if given.team > 1:
        meeting = given.work.resolve() / "state" / f"meeting-{Path(sys.argv[0]).stem}-{os.getppid()}"
        meeting.parent.mkdir(parents=True, exist_ok=True)
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=given.rank, world_size=given.team)
    return given


def team_rng(given: argparse.Namespace) -> np.random.Generator:
    """The random numbers of this member of the team; torch's are set apart as well, after the weights were drawn."""
    torch.manual_seed(given.seed + 1000 * (given.rank + 1))
    return np.random.default_rng([given.seed, given.rank])


def team_mean(value: float) -> float:
    """The mean of a number over the team."""
    if not distributed.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    distributed.all_reduce(shared)
    return float(shared) / distributed.get_world_size()


def share_gradients(parameters: Iterable[nn.Parameter], progress: float) -> float:
    """Averages the gradients over the team and returns the team's mean progress, so that all stop together.

    Two single-threaded processes lose far less on busy cores than one process whose every operation waits for two
    threads.
    """
    if not distributed.is_initialized():
        return progress
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([progress])])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return float(flat[-1])


def pick_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """Progress 0..1 through a time budget, going on where a snapshot stopped."""

    def __init__(self, minutes: float, elapsed_s: float = 0.0) -> None:
        self.budget_s = minutes * 60
        self.start = time.time() - elapsed_s

    @property
    def elapsed_s(self) -> float:
        return time.time() - self.start

    @property
    def progress(self) -> float:
        return min(self.elapsed_s / self.budget_s, 1.0)


def learning_rate(peak: float, progress: float, step: int, warmup_steps: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up by steps, then a cosine down to floor * peak by progress through the time budget."""
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min((step + 1) / warmup_steps, 1.0) * cosine


class AveragedWeights:
    """An exponential moving average of a module's parameters; buffers are copied."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.step = 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                self.values[name].lerp_(value.detach(), 1 - decay)
            else:
                self.values[name].copy_(value)

    def applied_to(self, module: nn.Module) -> nn.Module:
        """A copy of the module, in evaluation mode, that holds the averaged weights."""
        import copy

        twin = copy.deepcopy(module)
        twin.load_state_dict(self.values)
        return twin.eval().requires_grad_(False)


class Curve:
    """Rows of numbers written to NAME.csv, drawn as NAME.png."""

    def __init__(self, folder: Path, name: str, resume: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.csv"
        self.rows: list[dict[str, float]] = []
        if resume and self.path.exists():
            with self.path.open() as file:
                self.rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    def add(self, **values: float) -> None:
        """Adds a row, rewrites the files and prints it."""
        self.rows.append({k: float(f"{v:.6g}") for k, v in values.items()})
        names = list(dict.fromkeys(n for row in self.rows for n in row))
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        print("  ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)

    def draw(self, x: str, ys: list[str], log: bool = False) -> None:
        """Draws the columns `ys` over `x`, each scaled to its own range, into NAME.png."""
        width, height, margin = 480, 270, 36
        canvas = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(canvas)
        pen.rectangle((margin, 10, width - 10, height - margin), outline=(170, 170, 170))
        inks = [(200, 60, 40), (40, 90, 200), (40, 150, 70), (150, 80, 170), (210, 140, 20), (60, 60, 60)]
        for k, y in enumerate(ys):
            points = [(row[x], row[y]) for row in self.rows if x in row and y in row]
            if len(points) < 2:
                continue
            a = np.asarray(points)
            values = np.log10(np.maximum(a[:, 1], 1e-8)) if log else a[:, 1]
            low, high = values.min(), values.max()
            px = margin + (a[:, 0] - a[0, 0]) / max(np.ptp(a[:, 0]), 1e-9) * (width - 10 - margin)
            py = height - margin - (values - low) / max(high - low, 1e-9) * (height - margin - 10)
            pen.line([*zip(px, py, strict=True)], fill=inks[k % 6], width=2)
            pen.text((margin + 6 + 150 * (k % 3), height - 28 + 12 * (k // 3)), f"{y} {a[-1, 1]:.3g}", fill=inks[k % 6])
        last = self.rows[-1].get(x, 0) if self.rows else 0  # only the first of a team keeps rows
        pen.text((width - 110, 14), f"{x} 0..{last:.0f}", fill=(90, 90, 90))
        canvas.save(self.path.with_suffix(".png"), optimize=True)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder beside `target` and swaps it in, so that a reader never meets half a model."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(target.name + ".new")
    old = target.with_name(target.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    fresh.mkdir()
    write(fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a snapshot for --resume in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(dict(state), temporary)
    os.replace(temporary, path)


def contact_sheet(path: Path, pictures: list[Image.Image] | Tensor, columns: int, cell: int = 128) -> None:
    """Writes pictures (PIL, or a [B,3,H,W] tensor in [-1,1]) side by side into one PNG."""
    if isinstance(pictures, Tensor):
        array = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(a) for a in array]
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((cell, cell)), (i % columns * cell, i // columns * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B,H,W,3] as float [B,3,H,W] in [-1,1], channels last in memory."""
    x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float()
    return x.div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)
