"""Trains mini-clip: a vision tower that learns to agree with the shared text encoder on plain and styled pictures.

The text encoder stays as `train_text.py` left it, so mini-sd and mini-clip keep sharing it; the vision tower and both
projections learn by contrast within the batch (arXiv 2103.00020). Captions name the style half of the time. A linear
reader of attributes and look on the class token is trained along and thrown away.
"""

from __future__ import annotations

import os
import shutil
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
    share_gradients,
    team_rng,
)
from muon import Muon
from scenes import KINDS, LOOKS, SceneSet, open_set, world
from torch import Tensor, nn
from train_blip import altered, normalise
from train_text import text_config
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig
from whiten import whiten_patches

WIDTH = 128


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """CLIP ViT scaled down: 128 px, patches of 16, four layers."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
        hidden_act="quick_gelu",
        projection_dim=128,
    )
    return CLIPConfig(text_config=text_config(tokenizer).to_dict(), vision_config=vision.to_dict(), projection_dim=128)


def text_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded to the longest caption."""
    out = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    return out.input_ids, out.attention_mask


def embed(model: CLIPModel, x: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit image and text embeddings [B,128], and the vision tower's class token."""
    seen = model.vision_model(pixel_values=x).pooler_output
    said = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return F.normalize(model.visual_projection(seen), dim=-1), F.normalize(model.text_projection(said), dim=-1), seen


@torch.no_grad()
def evaluate(
    model: CLIPModel, tokenizer: CLIPTokenizer, test: SceneSet, styled: SceneSet, device: torch.device
) -> dict[str, float]:
    """On held-out scenes: the right caption among 100, the right one against one attribute changed, the style named."""
    rng = np.random.default_rng(3)
    scenes = [test.scene(i) for i in range(100)]
    x = normalise(pixels(test.images[:100], device))
    ids, mask = text_ids(tokenizer, [world.caption(s, rng) for s in scenes])
    image, text, _ = embed(model, x, ids.to(device), mask.to(device))
    similarity = image @ text.t()
    own = torch.arange(100, device=device)
    ids, mask = text_ids(tokenizer, [world.caption(altered(s, rng), rng) for s in scenes])
    _, wrong, _ = embed(model, x[:1], ids.to(device), mask.to(device))
    looks = torch.from_numpy(np.array(styled.styles[:100])).long()
    ids, mask = text_ids(tokenizer, [f"a picture in {style} style" for style in world.STYLES])
    painted, named, _ = embed(model, normalise(pixels(styled.images[:100], device)), ids.to(device), mask.to(device))
    return {
        "retrieval_of_100": float((similarity.argmax(1) == own).float().mean()),
        "retrieval_top5": float((similarity.topk(5, 1).indices == own[:, None]).any(1).float().mean()),
        "one_attribute_off": float(((image * text).sum(1) > (image * wrong).sum(1)).float().mean()),
        "style_named": float(((painted @ named.t()).argmax(1).cpu() + 1 == looks).float().mean()),
    }


def write_model(work: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Writes mini-clip/ in fp16 with tokenizer and image processor."""
    processor = CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128})

    def write(folder: Path) -> None:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            shutil.copyfile(work / "tokenizer-clip" / name, folder / name)

    replace_folder(work / "mini-clip", write)


def main() -> None:
    """Trains, and writes mini-clip/ and curves/clip.csv under the work folder."""
    given = arguments(__doc__.split("\n")[0], minutes=8, batch_size=48, peak_lr=4e-3)
    device = pick_device()
    plain, styled = open_set(given.data, "base", wait_for=1000), open_set(given.data, "styled", wait_for=500)
    test, styled_test = open_set(given.data, "base_test"), open_set(given.data, "styled_test")
    tokenizer = CLIPTokenizer.from_pretrained(given.work / "tokenizer-clip")
    model = CLIPModel(clip_config(tokenizer)).to(device)
    shared = CLIPTextModel.from_pretrained(given.work / "text_encoder")
    weights = {name.removeprefix("text_model."): value for name, value in shared.state_dict().items()}
    model.text_model.load_state_dict(weights)
    model.text_model.requires_grad_(False)
    vision = model.vision_model.embeddings
    whiten_patches(vision.patch_embedding, normalise(pixels(plain.images[:500], device)))
    nn.init.normal_(vision.position_embedding.weight, std=0.3)
    readers = nn.ModuleList(nn.Linear(WIDTH, n) for n in (*map(len, world.ATTRIBUTES.values()), len(LOOKS))).to(device)
    average = AveragedWeights(model, 0.998)
    both = nn.ModuleDict({"model": model, "readers": readers})
    optimizer = Muon(both.named_parameters(), lr=given.peak_lr, weight_decay=0.02, adam_scale=0.4)
    state_path = given.work / "state" / "clip.pt"
    step, seen, clock = 0, 0, Clock(given.minutes)
    if given.resume:
        state = torch.load(state_path, map_location=device)
        both.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[1]["scale"] = 0.4
        average.values, average.step = state["average"], state["average_step"]
        step, seen, clock = state["step"], state["seen"], Clock(given.minutes, state["elapsed_s"])
    curve = Curve(given.work / "curves", "clip", given.resume)
    rng = team_rng(given)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def save() -> None:
        twin = average.applied_to(model)
        figures = evaluate(twin, tokenizer, test, styled_test, device)
        curve.add(step=step, minutes=clock.elapsed_s / 60, pictures=seen, **running, **figures)
        curve.draw("minutes", ["retrieval_of_100", "one_attribute_off", "style_named", "contrast", "read"])
        write_model(given.work, twin, tokenizer)
        state = {
            "weights": both.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.values,
            "average_step": average.step,
            "step": step,
            "seen": seen,
            "elapsed_s": clock.elapsed_s,
        }
        save_state(state_path, state)

    running: dict[str, float] = {}
    last_save, progress = time.time(), clock.progress
    while progress < 1:
        some = given.batch_size // 3
        rows = [np.sort(rng.integers(0, len(s), n)) for s, n in ((plain, given.batch_size - some), (styled, some))]
        images = np.concatenate([plain.images[rows[0]], styled.images[rows[1]]])
        looks = np.concatenate([plain.styles[rows[0]], styled.styles[rows[1]]]).astype(np.int64)
        attributes = np.concatenate([plain.attributes[rows[0]], styled.attributes[rows[1]]]).astype(np.int64)
        truth = torch.from_numpy(np.column_stack([attributes, looks])).to(device)
        texts = []
        for row in truth.tolist():
            scene = world.Scene(**{kind: world.ATTRIBUTES[kind][row[k]] for k, kind in enumerate(KINDS)})
            named = row[-1] and rng.random() < 0.5
            texts.append(world.caption(scene, rng, LOOKS[row[-1]] if named else None))
        x = normalise(damage(pixels(images, torch.device("cpu")))).contiguous().to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.peak_lr, progress, step, 100)
        ids, mask = text_ids(tokenizer, texts)
        image, text, seen_tokens = embed(model, x, ids.to(device), mask.to(device))
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.t()
        own = torch.arange(len(texts), device=device)
        parts = {
            "contrast": 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)),
            "read": sum(F.cross_entropy(head(seen_tokens), truth[:, k]) for k, head in enumerate(readers)),
        }
        optimizer.zero_grad(set_to_none=True)
        (parts["contrast"] + 0.3 * parts["read"]).backward()
        progress = share_gradients([p for p in both.parameters() if p.requires_grad], clock.progress)
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        step += 1
        seen += len(texts) * given.team
        running = {k: 0.97 * running.get(k, v.item()) + 0.03 * v.item() for k, v in parts.items()}
        if step % 50 == 0 and given.rank == 0:
            print(f"step {step} " + " ".join(f"{k} {v:.3f}" for k, v in running.items()), flush=True)
        if given.rank == 0 and time.time() - last_save > 150:
            save()
            last_save = time.time()
    if given.rank == 0:
        save()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
