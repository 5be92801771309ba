"""Trains the UNet of mini-sd on cached latents of plain scenes, and writes the whole pipeline folder.

The encoder of the autoencoder and the text encoder are frozen. Latents are encoded while training already runs on the
first part. Losses are weighted by min-SNR (arXiv 2303.09556, gamma 5) and, because a subject covers a third of a
picture but carries three of five attributes, more strongly where the subject is.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
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
    team_mean,
    team_rng,
)
from muon import Muon
from PIL import Image
from scenes import KINDS, SceneSet, open_set, world
from torch import Tensor
from train_text import tokenize, with_strange_words
from transformers import CLIPTextModel, CLIPTokenizer

UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 96, 96),
    "layers_per_block": 1,
    "cross_attention_dim": 160,
    "attention_head_dim": 4,  # the number of heads, as in Stable Diffusion 1.5's own config
    "norm_num_groups": 16,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class Latents:
    """Means, deviations and subject weights of a scene set, encoded a batch at a time and kept in memory."""

    def __init__(self, vae: AutoencoderKL, scenes: SceneSet, device: torch.device, subject_weight: float) -> None:
        self.vae, self.scenes, self.device = vae, scenes, device
        self.subject_weight = subject_weight
        self.mean: list[Tensor] = []
        self.std: list[Tensor] = []
        self.weight: list[Tensor] = []
        self.count = 0

    @property
    def complete(self) -> bool:
        return self.count >= len(self.scenes)

    @torch.no_grad()
    def encode(self, amount: int) -> None:
        """Encodes the next `amount` pictures."""
        rows = slice(self.count, min(self.count + amount, len(self.scenes)))
        posterior = self.vae.encode(pixels(self.scenes.images[rows], self.device)).latent_dist
        mask = torch.from_numpy(self.scenes.masks[rows].astype(np.float32) / 255)[:, None]
        weight = 1 + self.subject_weight * F.avg_pool2d(mask, 8)
        self.mean.append(posterior.mean.half())
        self.std.append(posterior.std.half())
        self.weight.append((weight / weight.mean((1, 2, 3), keepdim=True)).half().to(self.device))
        self.count = rows.stop

    def draw(self, indices: np.ndarray, batch: int) -> tuple[Tensor, Tensor]:
        """Sampled latents (unscaled) [B,4,16,16] and weights [B,1,16,16]; `batch` is encode()'s usual amount."""
        parts = [
            (self.mean[i // batch][i % batch], self.std[i // batch][i % batch], self.weight[i // batch][i % batch])
            for i in indices
        ]
        mean, std, weight = (torch.stack(p).float() for p in zip(*parts, strict=True))
        return mean + std * torch.randn_like(mean), weight


def write_pipeline(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vocabulary: Path,
) -> None:
    """Writes a diffusers folder in fp16, laid out as Stable Diffusion 1.5's.

    Args:
        vocabulary: the folder of vocab.json and merges.txt, which transformers 5 no longer writes by itself.
    """
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half().to(memory_format=torch.contiguous_format),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half().to(memory_format=torch.contiguous_format),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # where a part was loaded from is nobody's business
        config = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
        file.write_text(json.dumps(config, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        shutil.copyfile(vocabulary / name, folder / "tokenizer" / name)


@torch.no_grad()
def generate(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    prompts: list[str],
    device: torch.device,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 5.0,
) -> list[Image.Image]:
    """Pictures of the prompts: DDIM with classifier-free guidance, batches of 16."""
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False)
    scheduler.set_timesteps(steps)
    empty = text_encoder(tokenize(tokenizer, [""]).to(device)).last_hidden_state
    generator = torch.Generator().manual_seed(seed)
    out: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        some = prompts[start : start + 16]
        context = text_encoder(tokenize(tokenizer, some).to(device)).last_hidden_state
        context = torch.cat([empty.expand_as(context), context])
        latents = torch.randn(len(some), 4, 16, 16, generator=generator).to(device)
        for t in scheduler.timesteps:
            without, with_ = unet(torch.cat([latents, latents]), t, context).sample.chunk(2)
            latents = scheduler.step(without + guidance * (with_ - without), t, latents).prev_sample
        y = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
        array = ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        out.extend(Image.fromarray(a) for a in array)
    return out


def prompt_scenes(count: int, seed: int, split: str = "held_out") -> tuple[list[world.Scene], list[str]]:
    """Scenes that no training saw, and a caption of each."""
    rng = np.random.default_rng(seed)
    scenes = [world.random_scene(rng, split) for _ in range(count)]
    return scenes, [world.caption(scene, rng) for scene in scenes]


def main() -> None:
    """Trains, and writes mini-sd/, curves/unet.csv and looks/unet_*.png under the work folder."""
    given = arguments(
        __doc__.split("\n")[0],
        minutes=60,
        batch_size=16,
        peak_lr=2e-3,
        subject_weight=1.5,
        eval_every=10.0,
        start_from="",
    )
    device = pick_device()
    tokenizer = CLIPTokenizer.from_pretrained(given.work / "tokenizer-clip")
    text_encoder = (
        CLIPTextModel.from_pretrained(given.work / "text_encoder", dtype=torch.float32)
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    vae = AutoencoderKL.from_pretrained(given.work / "vae").to(device, memory_format=torch.channels_last)
    vae.eval().requires_grad_(False)
    unet = UNet2DConditionModel(**UNET)
    if (
        given.start_from
    ):  # an older UNet knows the world already, also where the autoencoder's latents have moved a little
        unet = UNet2DConditionModel.from_pretrained(given.start_from, torch_dtype=torch.float32).train()
    unet = unet.to(device, memory_format=torch.channels_last)
    latents = Latents(vae, own_part(open_set(given.data, "base", wait_for=4000), given), device, given.subject_weight)
    chunk = 16
    average = AveragedWeights(unet, 0.997)
    optimizer = Muon(unet.named_parameters(), lr=given.peak_lr, weight_decay=0.01)
    state_path = given.work / "state" / "unet.pt"
    step, seen, clock, scaling = 0, 0, Clock(given.minutes), 0.0
    if given.resume:
        state = torch.load(state_path, map_location=device)
        unet.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.step = state["average"], state["average_step"]
        step, seen, scaling = state["step"], state["seen"], state["scaling"]
        clock = Clock(given.minutes, state["elapsed_s"])
    while latents.count < min(960, len(latents.scenes)):
        latents.encode(chunk)
    scaling = team_mean(scaling or 1 / float(torch.cat(latents.mean).float().std()))
    vae.register_to_config(scaling_factor=scaling)
    print(
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters, scaling factor {scaling:.4f}", flush=True
    )
    alphas = torch.as_tensor(DDIMScheduler(**SCHEDULE).alphas_cumprod).to(device)
    snr = alphas / (1 - alphas)
    curve = Curve(given.work / "curves", "unet", given.resume)
    rng = team_rng(given)

    def save(judge: bool) -> None:
        twin = average.applied_to(unet)
        figures: dict[str, float] = {}
        if judge:
            scenes, prompts = prompt_scenes(48, 1)
            pictures = generate(twin, newest_decoder(vae, given.work), text_encoder, tokenizer, prompts, device)
            figures = read_back(pictures, scenes, given.work)
            contact_sheet(given.work / "looks" / f"unet_{clock.elapsed_s / 60:03.0f}min.png", pictures[:48], 12)
        curve.add(step=step, minutes=clock.elapsed_s / 60, pictures=seen, loss=running, **figures)
        curve.draw("minutes", ["loss", *KINDS] if any("subject" in row for row in curve.rows) else ["loss"])
        replace_folder(
            given.work / "mini-sd",
            lambda folder: write_pipeline(
                folder, twin, newest_decoder(vae, given.work), text_encoder, tokenizer, given.work / "tokenizer-clip"
            ),
        )
        save_state(
            state_path,
            {
                "weights": unet.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.values,
                "average_step": average.step,
                "step": step,
                "seen": seen,
                "scaling": scaling,
                "elapsed_s": clock.elapsed_s,
            },
        )

    running, last_save, last_judged, progress = 0.0, time.time(), time.time(), clock.progress
    while progress < 1:
        if not latents.complete:
            latents.encode(chunk)
        elif (
            step % 200 == 0
            and len(newer := own_part(open_set(given.data, "base"), given)) > latents.count
            and latents.count % chunk == 0
        ):
            latents.scenes = newer
        indices = rng.integers(0, latents.count, given.batch_size)
        clean, weight = latents.draw(indices, chunk)
        clean = clean * scaling
        texts = [
            "" if rng.random() < 0.1 else with_strange_words(world.caption(latents.scenes.scene(int(i)), rng), rng, 0.1)
            for i in indices
        ]
        with torch.no_grad():
            context = text_encoder(tokenize(tokenizer, texts).to(device)).last_hidden_state
        # Stratified: each batch covers the whole range of noise, which steadies the gradient.
        spread = (torch.arange(len(indices)) + torch.rand(len(indices))) / len(indices)
        timesteps = (spread * 1000).long().clamp(0, 999).to(device)
        noise = torch.randn_like(clean)
        a = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * clean + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.peak_lr, progress, step, 100)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = unet(noisy, timesteps, context).sample
        error = (weight * (predicted.float() - noise) ** 2).mean((1, 2, 3))
        loss = (snr[timesteps].clamp(max=5.0) / snr[timesteps] * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        progress = share_gradients(unet.parameters(), clock.progress)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(unet)
        step += 1
        seen += len(indices) * given.team
        running = loss.item() if not running else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0 and given.rank == 0:
            print(f"step {step} loss {running:.4f} latents {latents.count} progress {clock.progress:.3f}", flush=True)
        if given.rank == 0 and time.time() - last_save > 180:
            judge = time.time() - last_judged > given.eval_every * 60
            save(judge)
            last_save = time.time()
            last_judged = last_save if judge else last_judged
    if given.rank == 0:
        save(judge=True)


def own_part(scenes: SceneSet, given: argparse.Namespace) -> SceneSet:
    """Every n-th picture, so that each member of a team encodes and trains on its own."""
    every = slice(given.rank, None, given.team)
    return SceneSet(scenes.images[every], scenes.masks[every], scenes.attributes[every], scenes.styles[every])


def newest_decoder(vae: AutoencoderKL, work: Path) -> AutoencoderKL:
    """The autoencoder with the latest decoder in the work folder, which may be trained further meanwhile."""
    try:
        newest = AutoencoderKL.from_pretrained(work / "vae").to(vae.device).eval().requires_grad_(False)
    except OSError:
        return vae
    newest.register_to_config(scaling_factor=vae.config.scaling_factor)
    return newest


def read_back(pictures: list[Image.Image], scenes: list[world.Scene], work: Path) -> dict[str, float]:
    """Share of prompted attributes that the judges read in the pictures, per kind and over all kinds."""
    if not (work / "judges").exists():
        return {}
    from lora_scripts.builtin.judges import load_judges

    rows = load_judges(work / "judges").read_attributes(pictures)
    shares = {k: float(np.mean([row[k] == getattr(s, k) for row, s in zip(rows, scenes, strict=True)])) for k in KINDS}
    return {**shares, "overall": float(np.mean(list(shares.values())))}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
