"""Trains the judges: a classifier of attributes and one of styles, on plain and styled scenes.

Unlike the models they judge, they are shown every combination of attributes. Both see damaged pictures (crop, brightness, blur, noise, JPEG) and, once there is an autoencoder in the work folder,
its reconstructions, because what they will judge has passed through a decoder.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import damage
from harness import (
    AveragedWeights,
    Clock,
    Curve,
    arguments,
    learning_rate,
    pick_device,
    pixels,
    replace_folder,
    save_state,
)
from muon import Muon
from safetensors.torch import save_file
from scenes import KINDS, LOOKS, SceneSet, open_set, world
from torch import Tensor

from lora_scripts.builtin.judges import Reader, attribute_reader, style_reader


def reconstructions(work: Path, sets: list[SceneSet], count: int, device: torch.device) -> dict[str, np.ndarray]:
    """`count` pictures of each set through the autoencoder, with their labels; cached in data/reconstructed.npz."""
    from diffusers import AutoencoderKL

    cache = work / "data" / "reconstructed.npz"
    if cache.exists():
        return dict(np.load(cache))
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
    parts: dict[str, list[np.ndarray]] = {"images": [], "attributes": [], "styles": []}
    for scenes in sets:
        for start in range(0, min(count, len(scenes)), 16):
            rows = slice(start, start + 16)
            with torch.no_grad():
                latents = vae.encode(pixels(scenes.images[rows], device)).latent_dist.mean
                latents = latents + 0.1 * latents.std() * torch.randn_like(latents)
                y = vae.decode(latents).sample.clamp(-1, 1)
            parts["images"].append(((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
            parts["attributes"].append(np.array(scenes.attributes[rows]))
            parts["styles"].append(np.array(scenes.styles[rows]))
    arrays = {name: np.concatenate(rows) for name, rows in parts.items()}
    np.savez(cache, **arrays)
    return arrays


@torch.no_grad()
def accuracy(reader: Reader, scenes: SceneSet, device: torch.device) -> dict[str, float]:
    """Share of right answers of each head on the whole of a set."""
    right: dict[str, list[Tensor]] = {}
    for start in range(0, len(scenes), 64):
        rows = slice(start, start + 64)
        for name, logits in reader(pixels(scenes.images[rows], device)).items():
            truth = scenes.styles[rows] if name == "style" else scenes.attributes[rows, KINDS.index(name)]
            right.setdefault(name, []).append(logits.argmax(1).cpu() == torch.from_numpy(np.array(truth)))
    return {name: float(torch.cat(rows).float().mean()) for name, rows in right.items()}


def write_judges(folder: Path, readers: dict[str, Reader]) -> None:
    """Writes attributes.safetensors, styles.safetensors (fp16) and config.json."""
    for name, reader in readers.items():
        state = {k: v.half() if v.is_floating_point() else v for k, v in reader.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{name}.safetensors")
    config = {"attributes": {k: list(v) for k, v in world.ATTRIBUTES.items()}, "looks": list(LOOKS)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Trains both readers side by side and writes judges/ and curves/judges.csv under the work folder."""
    given = arguments(__doc__.split("\n")[0], minutes=6, batch_size=32, peak_lr=2e-3, reconstructed=0)
    device = pick_device()
    rng = np.random.default_rng(given.seed)
    plain, styled = open_set(given.data, "base", wait_for=1000), open_set(given.data, "styled", wait_for=1000)
    rare, rare_styled = open_set(given.data, "rare"), open_set(given.data, "rare_styled")
    plain_test, styled_test = open_set(given.data, "base_test"), open_set(given.data, "styled_test")
    blurred = reconstructions(given.work, [plain, styled], given.reconstructed, device) if given.reconstructed else None
    readers = {"attributes": attribute_reader().to(device), "styles": style_reader().to(device)}
    averages = {name: AveragedWeights(reader, 0.995) for name, reader in readers.items()}
    both = torch.nn.ModuleDict(readers)
    optimizer = Muon(both.named_parameters(), lr=given.peak_lr, weight_decay=0.02, adam_names=("stem", "heads"))
    state_path = given.work / "state" / "judges.pt"
    step, clock = 0, Clock(given.minutes)
    if given.resume:
        state = torch.load(state_path, map_location=device)
        for name, reader in readers.items():
            reader.load_state_dict(state[name])
            averages[name] = AveragedWeights(reader, 0.995)
    curve = Curve(given.work / "curves", "judges", given.resume)

    def save() -> None:
        twins = {name: averages[name].applied_to(reader) for name, reader in readers.items()}
        figures = {f"plain_{k}": v for k, v in accuracy(twins["attributes"], plain_test, device).items()}
        figures |= {f"styled_{k}": v for k, v in accuracy(twins["attributes"], styled_test, device).items()}
        figures["plain_style"] = accuracy(twins["styles"], plain_test, device)["style"]
        figures["styled_style"] = accuracy(twins["styles"], styled_test, device)["style"]
        curve.add(step=step, minutes=clock.elapsed_s / 60, loss=running, **figures)
        curve.draw("minutes", ["loss", *(f"plain_{k}" for k in KINDS)])
        replace_folder(given.work / "judges", lambda folder: write_judges(folder, twins))
        save_state(state_path, {name: reader.state_dict() for name, reader in readers.items()})

    running, last_save = 0.0, time.time()
    while clock.progress < 1:
        if step % 100 == 0:
            plain, styled = open_set(given.data, "base"), open_set(given.data, "styled")
        third, sixth = given.batch_size // 3, given.batch_size // 6
        sources = ((plain, given.batch_size - third - 2 * sixth), (styled, third), (rare, sixth), (rare_styled, sixth))
        picked = [(scenes, np.sort(rng.integers(0, len(scenes), n))) for scenes, n in sources]
        images = np.concatenate([scenes.images[rows] for scenes, rows in picked])
        attributes = np.concatenate([scenes.attributes[rows] for scenes, rows in picked])
        styles = np.concatenate([scenes.styles[rows] for scenes, rows in picked])
        if blurred is not None:
            take = rng.integers(0, len(blurred["images"]), given.batch_size // 4)
            images = np.concatenate([images, blurred["images"][take]])
            attributes = np.concatenate([attributes, blurred["attributes"][take]])
            styles = np.concatenate([styles, blurred["styles"][take]])
        x = damage(pixels(images, torch.device("cpu")), most_crop=0.08).to(device, memory_format=torch.channels_last)
        truth = torch.from_numpy(attributes.astype(np.int64)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.peak_lr, clock.progress, step, 50)
        loss = F.cross_entropy(readers["styles"](x)["style"], torch.from_numpy(styles.astype(np.int64)).to(device))
        for k, logits in enumerate(readers["attributes"](x).values()):
            loss = loss + F.cross_entropy(logits, truth[:, k])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        for name, reader in readers.items():
            averages[name].update(reader)
        step += 1
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step} loss {running:.3f} progress {clock.progress:.2f}", flush=True)
        if time.time() - last_save > 120:
            save()
            last_save = time.time()
    save()


if __name__ == "__main__":
    main()
