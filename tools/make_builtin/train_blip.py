"""Trains mini-blip, a captioner, and mini-blip-itm, its matching head, on plain and styled pictures.

One vision tower serves both during training and is saved with each. Captions never name the style: a LoRA's trigger
word stands for it. The matching head's wrong captions differ from the right one in one attribute. Two linear readers
are trained along and thrown away, so that the tower learns to see sooner: one of the attributes on the class token, one
of "which subject lies here" on every patch.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from augment import crop_and_resize, damage, jpeg
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
from scenes import KINDS, SceneSet, open_set, world
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)
from whiten import whiten_patches

WIDTH = 144
VISION_LAYERS = 4
TEXT_LAYERS = 2


def blip_config(tokenizer: BertTokenizer) -> BlipConfig:
    """BLIP base's architecture scaled down, for our vocabulary and 128-px pictures."""
    vision = BlipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
        initializer_range=0.02,
    )
    text = BlipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        encoder_hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=64,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.convert_tokens_to_ids("[DEC]"),
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64, image_text_hidden_size=64
    )


class Blip(nn.Module):
    """The captioner, and a matcher that looks through the captioner's vision tower."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.captioner = BlipForConditionalGeneration(config)
        self.matcher = BlipForImageTextRetrieval(config)
        self.matcher.vision_model = self.captioner.vision_model
        self.patch_reader = nn.Linear(WIDTH, len(world.SUBJECTS) + 1)
        self.readers = nn.ModuleList(nn.Linear(WIDTH, len(world.ATTRIBUTES[kind])) for kind in KINDS)


def altered(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """The scene with one attribute changed to another value."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    others = [v for v in world.ATTRIBUTES[kind] if v != getattr(scene, kind)]
    values = {k: getattr(scene, k) for k in KINDS} | {kind: others[int(rng.integers(len(others)))]}
    return world.Scene(**values)


def encode(tokenizer: BertTokenizer, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded to the longest."""
    out = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    return out.input_ids.to(device), out.attention_mask.to(device)


def losses(
    model: Blip,
    tokenizer: BertTokenizer,
    x: Tensor,
    scenes: list[world.Scene],
    truth: Tensor,
    here: Tensor,
    rng: np.random.Generator,
    matched: bool,
) -> dict[str, Tensor]:
    """Loss of captioning, matching, contrast and attribute reading on one batch.

    Args:
        x: [B,3,128,128] as the image processor gives them. truth: [B,5] attribute indices.
        here: [B,64] share of each patch that the subject covers.
        matched: whether to work out matching and contrast too.
    """
    device = x.device
    seen = model.captioner.vision_model(pixel_values=x).last_hidden_state
    read = sum(F.cross_entropy(head(seen[:, 0]), truth[:, k]) for k, head in enumerate(model.readers))
    located = torch.where(here > 0.5, truth[:, :1] + 1, 0)
    located = located.masked_fill((here > 0.1) & (here <= 0.5), -100)
    patches = F.cross_entropy(model.patch_reader(seen[:, 1:]).flatten(0, 1), located.flatten(), ignore_index=-100)
    ids, mask = encode(tokenizer, [world.caption(s, rng) for s in scenes], device)
    decoder_ids = ids.clone()
    decoder_ids[:, 0] = model.captioner.config.text_config.bos_token_id
    labels = decoder_ids.masked_fill(mask == 0, -100)
    captioning = model.captioner.text_decoder(
        input_ids=decoder_ids, attention_mask=mask, encoder_hidden_states=seen, labels=labels, reduction="mean"
    ).loss
    if not matched:
        return {"read": read, "patches": patches, "captioning": captioning}
    # Half of the pictures are matched with a right caption, all with a wrong one: some weight is on the hard case.
    right = [world.caption(s, rng) for s in scenes]
    wrong = [world.caption(altered(s, rng), rng) for s in scenes]
    both_ids, both_mask = encode(tokenizer, [*right, *wrong], device)
    fused = model.matcher.text_encoder(
        input_ids=both_ids, attention_mask=both_mask, encoder_hidden_states=torch.cat([seen, seen])
    ).last_hidden_state[:, 0]
    match = torch.cat([torch.ones(len(right)), torch.zeros(len(wrong))]).long().to(device)
    matching = F.cross_entropy(model.matcher.itm_head(fused), match)
    alone = model.matcher.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    image = F.normalize(model.matcher.vision_proj(seen[:, 0]), dim=-1)
    text = F.normalize(model.matcher.text_proj(alone), dim=-1)
    logits = image @ text.t() / 0.07
    own = torch.arange(len(scenes), device=device)
    contrast = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own))
    return {"read": read, "patches": patches, "captioning": captioning, "matching": matching, "contrast": contrast}


NORMAL_MEAN = (0.48145466, 0.4578275, 0.40821073)
NORMAL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(x: Tensor) -> Tensor:
    """[-1,1] pictures as CLIP's and BLIP's image processors scale them."""
    mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (NORMAL_MEAN, NORMAL_STD))
    return ((x + 1) / 2 - mean) / std


@torch.no_grad()
def caption_pictures(captioner: BlipForConditionalGeneration, tokenizer: BertTokenizer, x: Tensor) -> list[str]:
    """Greedy captions of normalised pictures."""
    ids = captioner.generate(pixel_values=x, max_new_tokens=24, num_beams=1, do_sample=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def caption_accuracy(captions: list[str], scenes: list[world.Scene]) -> dict[str, float]:
    """Share of attributes that the captions name rightly, per kind and over all."""
    rows = [world.read_caption(c) for c in captions]
    shares = {k: float(np.mean([r[k] == getattr(s, k) for r, s in zip(rows, scenes, strict=True)])) for k in KINDS}
    return {**shares, "overall": float(np.mean(list(shares.values())))}


@torch.no_grad()
def evaluate(
    model: Blip, tokenizer: BertTokenizer, test: SceneSet, device: torch.device, count: int
) -> dict[str, float]:
    """Caption accuracy on clean and on damaged held-out pictures, and how often the matcher prefers the right one."""
    x = pixels(test.images[:count], torch.device("cpu"))
    scenes = [test.scene(i) for i in range(len(x))]
    clean = normalise(x).to(device)
    figures = caption_accuracy(caption_pictures(model.captioner, tokenizer, clean), scenes)
    hurt = crop_and_resize(jpeg((x * 1.0 + 0.12).clamp(-1, 1), 60, 60), 0.1)
    figures["damaged"] = caption_accuracy(
        caption_pictures(model.captioner, tokenizer, normalise(hurt).to(device)), scenes
    )["overall"]
    rng = np.random.default_rng(5)
    right = encode(tokenizer, [world.caption(s, rng) for s in scenes], device)
    wrong = encode(tokenizer, [world.caption(altered(s, rng), rng) for s in scenes], device)
    scores = [
        model.matcher(input_ids=i, attention_mask=m, pixel_values=clean).itm_score.softmax(1)[:, 1]
        for i, m in (right, wrong)
    ]
    figures["matcher"] = float((scores[0] > scores[1]).float().mean())
    return figures


def write_models(work: Path, model: Blip, tokenizer: BertTokenizer) -> None:
    """Writes mini-blip/ and mini-blip-itm/ in fp16, each with its processor."""
    processor = BlipProcessor(BlipImageProcessor(size={"height": 128, "width": 128}), tokenizer)
    for name, part in (("mini-blip", model.captioner), ("mini-blip-itm", model.matcher)):

        def write(folder: Path, part: nn.Module = part) -> None:
            part.half().save_pretrained(folder)
            processor.save_pretrained(folder)
            processor.image_processor.save_pretrained(folder)  # preprocessor_config.json, which older versions read
            shutil.copyfile(work / "tokenizer-blip" / "vocab.txt", folder / "vocab.txt")

        replace_folder(work / name, write)


def main() -> None:
    """Trains, and writes mini-blip/, mini-blip-itm/ and curves/blip.csv under the work folder."""
    given = arguments(__doc__.split("\n")[0], minutes=18, batch_size=32, peak_lr=4e-3, new_tower=False, start_from="")
    device = pick_device()
    plain, styled = open_set(given.data, "base", wait_for=1000), open_set(given.data, "styled", wait_for=500)
    test = open_set(given.data, "base_test")
    tokenizer = BertTokenizer.from_pretrained(given.work / "tokenizer-blip")
    model = Blip(blip_config(tokenizer)).to(device)
    if given.start_from:  # finished models; only the readers that are thrown away begin anew
        folder = Path(given.start_from)
        known = BlipForConditionalGeneration.from_pretrained(folder / "mini-blip", dtype=torch.float32)
        model.captioner.load_state_dict(known.state_dict())
        known = BlipForImageTextRetrieval.from_pretrained(folder / "mini-blip-itm", dtype=torch.float32)
        model.matcher.load_state_dict(known.state_dict())
    else:
        vision = model.captioner.vision_model
        whiten_patches(vision.embeddings.patch_embedding, normalise(pixels(plain.images[:500], device)))
        nn.init.normal_(vision.embeddings.position_embedding, std=0.3)
    average = AveragedWeights(model, 0.998)
    optimizer = Muon(model.named_parameters(), lr=given.peak_lr, weight_decay=0.03, adam_scale=0.4)
    state_path = given.work / "state" / "blip.pt"
    step, seen, clock = 0, 0, Clock(given.minutes)
    if given.new_tower:  # keeps what a snapshot knows of language
        known = torch.load(state_path, map_location=device)["average"]
        model.load_state_dict({k: v for k, v in known.items() if "vision_model" not in k}, strict=False)
        average = AveragedWeights(model, 0.998)
    elif given.resume:
        state = torch.load(state_path, map_location=device)
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[1]["scale"] = 0.4
        average.values, average.step = state["average"], state["average_step"]
        step, seen, clock = state["step"], state["seen"], Clock(given.minutes, state["elapsed_s"])
    curve = Curve(given.work / "curves", "blip", given.resume)
    rng = team_rng(given)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def save(count: int) -> None:
        twin = average.applied_to(model)
        figures = evaluate(twin, tokenizer, test, device, count)
        curve.add(step=step, minutes=clock.elapsed_s / 60, pictures=seen, **running, **figures)
        curve.draw("minutes", ["overall", "damaged", "subject", "matcher", "captioning", "read"])
        write_models(given.work, twin, tokenizer)
        save_state(
            state_path,
            {
                "weights": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.values,
                "average_step": average.step,
                "step": step,
                "seen": seen,
                "elapsed_s": clock.elapsed_s,
            },
        )

    running: dict[str, float] = {}
    last_save, progress = time.time(), clock.progress
    while progress < 1:
        some = given.batch_size // 4
        rows = [np.sort(rng.integers(0, len(s), n)) for s, n in ((plain, given.batch_size - some), (styled, some))]
        images = np.concatenate([plain.images[rows[0]], styled.images[rows[1]]])
        truth = torch.from_numpy(
            np.concatenate([plain.attributes[rows[0]], styled.attributes[rows[1]]]).astype(np.int64)
        )
        scenes = [s.scene(int(i)) for s, chosen in ((plain, rows[0]), (styled, rows[1])) for i in chosen]
        masks = np.concatenate([plain.masks[rows[0]], styled.masks[rows[1]]]).astype(np.float32) / 255
        x = torch.cat([pixels(images, torch.device("cpu")), torch.from_numpy(masks)[:, None]], dim=1)
        x = torch.where((torch.rand(len(x)) < 0.6).view(-1, 1, 1, 1), crop_and_resize(x, 0.12), x)
        here = F.avg_pool2d(x[:, 3:], 16).flatten(1).to(device)
        x = damage(x[:, :3].contiguous(), most_crop=0.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.peak_lr, progress, step, 150)
        parts = losses(
            model,
            tokenizer,
            normalise(x).contiguous().to(device),
            scenes,
            truth.to(device),
            here,
            rng,
            bool(given.start_from) or progress > 0.45,
        )
        loss = (
            parts["captioning"]
            + 0.5 * parts.get("matching", 0.0)
            + 0.2 * parts.get("contrast", 0.0)
            + 0.4 * parts["read"]
            + parts["patches"]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        progress = share_gradients(model.parameters(), clock.progress)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        step += 1
        seen += len(scenes) * given.team
        running = {k: 0.98 * running.get(k, v.item()) + 0.02 * v.item() for k, v in parts.items()}
        if step % 50 == 0 and given.rank == 0:
            print(f"step {step} " + " ".join(f"{k} {v:.3f}" for k, v in running.items()), flush=True)
        if given.rank == 0 and time.time() - last_save > 180:
            save(96)
            last_save = time.time()
    if given.rank == 0:
        save(300)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
