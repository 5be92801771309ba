"""Trains the autoencoder of mini-sd: AutoencoderKL, 128 px to 4 x 16 x 16.

Most of the time goes into 64-px crops, most of them on the subject, which gives four times as many per second;
the rest into whole pictures. Only plain scenes are used, part of them in looks invented by `augment.new_looks`, so that
an adapter can later learn any of the world's styles without the decoder standing in its way.

With --keep-latents a finished autoencoder is trained on, but plain pictures keep the latents that they had: a UNet
trained on those stays valid, while other looks may find a better code and the decoder grows sharper.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import doodles, new_looks
from diffusers import AutoencoderKL
from harness import (
    AveragedWeights,
    Clock,
    Curve,
    arguments,
    contact_sheet,
    learning_rate,
    pick_device,
    pixels,
    replace_folder,
    save_state,
    share_gradients,
    team_rng,
)
from muon import Muon
from scenes import SceneSet, open_set
from torch import Tensor

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 128,
    "act_fn": "silu",
}


def draw_batch(data: SceneSet, rng: np.random.Generator, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures [B,size,size,3] and masks; crops lie on the subject three times out of four."""
    images = np.empty((count, size, size, 3), np.uint8)
    masks = np.empty((count, size, size), np.uint8)
    for i, index in enumerate(rng.integers(0, len(data), count)):
        room = data.images.shape[1] - size
        top = left = 0
        if room:
            if rng.random() < 0.75:
                rows, columns = np.nonzero(data.masks[index] > 127)
                k = rng.integers(len(rows))
                top, left = (int(np.clip(p - size // 2, 0, room)) for p in (rows[k], columns[k]))
            else:
                top, left = (int(v) for v in rng.integers(0, room + 1, 2))
        images[i] = data.images[index, top : top + size, left : left + size]
        masks[i] = data.masks[index, top : top + size, left : left + size]
    return images, masks


def reconstruction_loss(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L1 weighted towards subjects and edges, plus L1 of gradients and of coarser scales.

    Args:
        output, target: [B,3,H,W]. mask: [B,1,H,W] in 0..1.
    """
    grey = target.mean(1, keepdim=True)
    edge = (F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1)).clamp(0, 1)
    weight = 1 + 2 * mask + 2 * edge
    difference = output - target
    loss = (weight * difference.abs()).mean()
    for dim in (2, 3):
        loss = loss + torch.diff(difference, dim=dim).abs().mean()
    for scale in (2, 4):
        loss = loss + 0.5 * F.avg_pool2d(difference, scale).abs().mean()
    return loss


@torch.no_grad()
def evaluate(vae: AutoencoderKL, data: SceneSet, device: torch.device, count: int = 48) -> dict[str, float]:
    """Mean absolute error (0..255) over the picture and over the subject, and the standard deviation of latents."""
    every = np.linspace(0, len(data) - 1, count).astype(int)
    x = pixels(data.images[every], device)
    mask = torch.from_numpy(data.masks[every].astype(np.float32) / 255).to(device)[:, None]
    latents = vae.encode(x).latent_dist.mean
    difference = (vae.decode(latents).sample.clamp(-1, 1) - x).abs() * 127.5
    subject = (difference * mask).sum() / (mask.sum() * 3)
    return {"error": float(difference.mean()), "subject_error": float(subject), "latent_std": float(latents.std())}


def main() -> None:
    """Trains, and writes vae/, curves/vae.csv and looks/vae_*.png under the work folder."""
    given = arguments(
        __doc__.split("\n")[0], minutes=28, batch_size=16, peak_lr=3e-3, keep_latents=False, start_from=""
    )
    device = pick_device()
    data = open_set(given.data, "base", wait_for=1500)
    test = open_set(given.data, "base_test", wait_for=100)
    styled = open_set(given.data, "styled", wait_for=100)
    bank = pixels(doodles(600, 128, np.random.default_rng(given.seed)), torch.device("cpu"))
    vae = AutoencoderKL.from_pretrained(given.start_from).float() if given.start_from else AutoencoderKL(**CONFIG)
    vae = vae.to(device, memory_format=torch.channels_last).train()
    state_path = given.work / "state" / "vae.pt"
    if given.keep_latents and (given.work / "state" / "vae_kept.pt").exists():
        state_path = given.work / "state" / "vae_kept.pt"
    average = AveragedWeights(vae, 0.995)
    step, clock = 0, Clock(given.minutes)
    optimizer = Muon(vae.named_parameters(), lr=given.peak_lr)
    if given.resume or (given.keep_latents and not given.start_from):
        state = torch.load(state_path, map_location=device)
        vae.load_state_dict(state["average"] if given.keep_latents else state["weights"])
        average = AveragedWeights(vae, 0.995)
        if not given.keep_latents:
            if state.get("kind") == "muon":
                optimizer.load_state_dict(state["optimizer"])
            average.values, average.step = state["average"], state["average_step"]
            step, clock = state["step"], Clock(given.minutes, state["elapsed_s"])
    before = copy.deepcopy(vae).eval().requires_grad_(False) if given.keep_latents else None
    name = "vae_kept" if given.keep_latents else "vae"
    curve = Curve(given.work / "curves", name, given.resume)
    rng = team_rng(given)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)

    def save() -> None:
        twin = average.applied_to(vae)
        figures = evaluate(twin, test, device)
        curve.add(step=step, minutes=clock.elapsed_s / 60, loss=running, pictures=seen, **figures)
        curve.draw("minutes", ["error", "subject_error", "loss"])
        twin.register_to_config(scaling_factor=1 / figures["latent_std"])
        replace_folder(given.work / "vae", lambda folder: twin.save_pretrained(folder))
        save_state(
            given.work / "state" / f"{name}.pt",
            {
                "kind": "muon",
                "weights": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.values,
                "average_step": average.step,
                "step": step,
                "elapsed_s": clock.elapsed_s,
            },
        )
        write_looks(twin, test, styled, given.work / "looks" / f"{name}_{clock.elapsed_s / 60:03.0f}min.png", device)

    running, seen, last_save, progress = 0.0, 0, time.time(), clock.progress
    while progress < 1:
        if step % 500 == 0:
            data = open_set(given.data, "base")
        whole = progress > 0.7
        size, count = (128, max(given.batch_size // 4, 1)) if whole else (64, given.batch_size)
        images, masks = draw_batch(data, rng, count, size)
        plain = pixels(images, torch.device("cpu"))
        x = new_looks(plain, 0.6 if before else 0.4, bank)
        unchanged = (x == plain).flatten(1).all(1).to(device)
        x = x.to(device)
        mask = torch.from_numpy(masks.astype(np.float32) / 255)[:, None].to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.peak_lr, progress, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(x).latent_dist
            output = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(output.float(), x, mask)
        if before is not None and unchanged.any():
            with torch.no_grad():
                known = before.encode(x[unchanged]).latent_dist.mean
            loss = loss + 0.5 * (posterior.mean[unchanged] - known).abs().mean()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + 3e-4 * kl).backward()
        progress = share_gradients(vae.parameters(), clock.progress)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        step += 1
        seen += count * given.team
        running = float(loss.detach()) if not running else 0.98 * running + 0.02 * float(loss.detach())
        if given.rank == 0 and time.time() - last_save > 150:
            save()
            last_save = time.time()
    if given.rank == 0:
        save()


def write_looks(vae: AutoencoderKL, test: SceneSet, styled: SceneSet, path: Path, device: torch.device) -> None:
    """A contact sheet: plain pictures and two of each style, each above its reconstruction."""
    x = torch.cat([pixels(test.images[:12], device), pixels(styled.images[:12], device)])
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
    contact_sheet(path, torch.cat([x[:12], y[:12], x[12:], y[12:]]), 12)


if __name__ == "__main__":
    main()
