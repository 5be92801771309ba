"""Look and prompt similarity, and how far a CLIP is trusted, on embeddings made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lora_scripts.choosing.likeness import Reference, Trust

NUM, WIDTH = 12, 16
CAPTIONS = [f"caption {number}" for number in range(NUM)]


def embeddings(knows: float, style: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures and captions [NUM,WIDTH]: a picture is its caption's direction times `knows`, a common style, and noise."""
    generator = torch.Generator().manual_seed(seed)
    texts = normalize(torch.randn(NUM, WIDTH, generator=generator), dim=1)
    look = torch.zeros(WIDTH)
    look[0] = style
    noise = 0.1 * torch.randn(NUM, WIDTH, generator=generator)
    return normalize(knows * texts + look + noise, dim=1), texts


def reference(knows: float) -> Reference:
    images, texts = embeddings(knows)
    return Reference(images, texts, CAPTIONS, CAPTIONS)


def test_clip_that_tells_captions_apart_is_trusted_and_one_at_chance_is_not() -> None:
    assert reference(1.0).trust.weight > 0.95
    assert reference(0.0).trust.weight < 0.2
    assert Trust(0.5, 0.05).weight == 0
    assert Trust(0.4, 0.0).weight == 0


def test_pictures_without_the_look_are_farther_from_the_training_set() -> None:
    known = reference(1.0)
    images, texts = embeddings(1.0, seed=1)
    plain, _ = embeddings(1.0, style=0.0, seed=1)
    styled, bare = known.measure(images, texts, CAPTIONS), known.measure(plain, texts, CAPTIONS)
    assert sum(styled.look) > sum(bare.look) + NUM


def test_pictures_that_show_another_prompt_lose_prompt_likeness_only() -> None:
    known = reference(1.0)
    images, texts = embeddings(1.0, seed=1)
    right = known.measure(images, texts, CAPTIONS)
    wrong = known.measure(images.roll(1, dims=0), texts, CAPTIONS)
    assert sum(wrong.prompt) < sum(right.prompt) - NUM
    assert sum(wrong.look) == pytest.approx(sum(right.look))


def test_what_all_prompts_share_does_not_count() -> None:
    known = reference(1.0)
    images, texts = embeddings(1.0, seed=1)
    trigger = torch.full((WIDTH,), 0.2)
    plain = known.measure(images, texts, CAPTIONS)
    shared = known.measure(images, texts + trigger, CAPTIONS)
    assert shared.prompt == pytest.approx(plain.prompt, abs=1e-4)


def test_wrong_caption_is_found_by_its_hits() -> None:
    images, texts = embeddings(1.0)
    swapped = texts.clone()
    swapped[[2, 7]] = texts[[7, 2]]
    hits = Reference(images, swapped, CAPTIONS, CAPTIONS).caption_hits
    assert sorted(hits, key=hits.__getitem__)[:2] == sorted((CAPTIONS[2], CAPTIONS[7]), key=hits.__getitem__)


def test_pictures_with_the_same_caption_are_not_held_against_each_other() -> None:
    images, texts = embeddings(1.0)
    captions = ["same" if number < 4 else caption for number, caption in enumerate(CAPTIONS)]
    texts[:4] = texts[0]
    images[:4] = normalize(texts[:4] + images[4] * 0.01, dim=1)
    assert Reference(images, texts, captions, CAPTIONS).caption_hits[CAPTIONS[0]] == 1.0
