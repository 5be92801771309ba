"""Trains the text encoder that mini-sd and mini-clip share, from captions alone.

The encoder learns to hold, at the end token and at every padding token after it, which attributes and which style the
caption names. Both models then start from words that already mean something, as Stable Diffusion started from CLIP's
text encoder, and neither changes the encoder any more: the UNet's prompt embeddings can be computed once.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from harness import Clock, Curve, arguments, learning_rate, pick_device, replace_folder
from make_tokenizers import COMMON_WORDS
from scenes import KINDS, LOOKS, attribute_indices, world
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 77


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Stable Diffusion 1.5's text encoder, scaled down, for our vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def with_strange_words(text: str, rng: np.random.Generator, share: float = 0.3) -> str:
    """The caption, sometimes with one to three words before or behind it that say nothing about the picture."""
    if rng.random() >= share:
        return text
    words = []
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.5:
            words.append("".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(2, 8)))))
        else:
            words.append(_NEUTRAL[int(rng.integers(len(_NEUTRAL)))])
    extra = " ".join(words)
    return f"{extra}, {text}" if rng.random() < 0.5 else f"{text}, {extra}"


def _neutral_words() -> list[str]:
    """Words of prompts that name neither an attribute's value nor a style."""
    named = {w for s in world.STYLES for w in s.split()} | {"print", "ink", "wash", "art"}
    out = []
    for word in COMMON_WORDS:
        read = world.read_caption(f"{word} cat")
        if word not in named and read["subject"] == "cat" and [v for v in read.values() if v is not None] == ["cat"]:
            out.append(word)
    return out


_NEUTRAL = _neutral_words()


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int = MAX_TOKENS) -> Tensor:
    """[B, length] token ids, cut and padded as Stable Diffusion does."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def draw_captions(rng: np.random.Generator, count: int) -> tuple[list[str], np.ndarray]:
    """Captions of any scenes, half with a style, and their [count, 6] attribute and look indices."""
    texts, targets = [], np.empty((count, len(KINDS) + 1), np.int64)
    for i in range(count):
        scene = world.random_scene(rng, "train")
        look = int(rng.integers(len(LOOKS))) if rng.random() < 0.5 else 0
        text = world.caption(scene, rng, LOOKS[look] if look else None)
        texts.append(with_strange_words(text, rng))
        targets[i] = [*attribute_indices(scene), look]
    return texts, targets


def main() -> None:
    """Trains, and writes text_encoder/ and curves/text.csv under the work folder."""
    given = arguments(__doc__.split("\n")[0], minutes=2.5, batch_size=128, peak_lr=2e-3)
    device = pick_device()
    rng = np.random.default_rng(given.seed)
    tokenizer = CLIPTokenizer.from_pretrained(given.work / "tokenizer-clip")
    encoder = CLIPTextModel(text_config(tokenizer)).to(device)
    heads = nn.ModuleList([nn.Linear(160, n) for n in (*map(len, world.ATTRIBUTES.values()), len(LOOKS))]).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=given.peak_lr, weight_decay=0.01)
    curve, clock, step, running = Curve(given.work / "curves", "text"), Clock(given.minutes), 0, 0.0
    print(f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters", flush=True)

    def step_on(texts: list[str], targets: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        ids = tokenize(tokenizer, texts, length).to(device)
        hidden = encoder(ids).last_hidden_state
        end = (ids == tokenizer.eos_token_id).int().argmax(1)
        later = end + (torch.rand(len(ids), device=device) * (length - end)).long()
        rows = torch.arange(len(ids), device=device)
        truth = torch.from_numpy(targets).to(device)
        loss, right = torch.zeros((), device=device), []
        for places in (end, later):
            read = hidden[rows, places]
            for k, head in enumerate(heads):
                logits = head(read)
                loss = loss + F.cross_entropy(logits, truth[:, k])
                right.append((logits.argmax(1) == truth[:, k]).float().mean())
        return loss, torch.stack(right).min()

    while clock.progress < 1:
        texts, targets = draw_captions(rng, given.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.peak_lr, clock.progress, step, 50)
        loss, _ = step_on(texts, targets, int(rng.choice([28, 36, 77], p=[0.6, 0.2, 0.2])))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        running = loss.item() if not running else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0:
            curve.add(step=step, minutes=clock.elapsed_s / 60, loss=running)
    encoder.eval()
    with torch.no_grad():
        _, worst = step_on(*draw_captions(np.random.default_rng(given.seed + 1), 512), MAX_TOKENS)
    curve.add(step=step, minutes=clock.elapsed_s / 60, loss=running, worst_kind_accuracy=float(worst))
    curve.draw("minutes", ["loss"])
    replace_folder(given.work / "text_encoder", lambda folder: encoder.save_pretrained(folder))


if __name__ == "__main__":
    main()
