"""Per-picture fits from training losses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lora_scripts.data.sampler import Sample
from lora_scripts.families.protocol import Loss
from lora_scripts.training.picture_losses import PictureLosses, picture_fits

NUM, PER_STEP = 10, 2
HARD = {3: 2.0, 7: 1.5}


def loss_of(indices: list[int], generator: torch.Generator) -> Loss:
    """Losses that fall a hundredfold over the noise range, higher for the hard pictures, with some scatter."""
    levels = torch.rand(len(indices), generator=generator)
    factors = torch.tensor([HARD.get(index, 1.0) for index in indices])
    values = factors * 10 ** (-2 * levels) * torch.exp(0.1 * torch.randn(len(indices), generator=generator))
    return Loss(values.sum(), len(indices), values, levels)


def state_of(losses: PictureLosses) -> dict[str, Any]:
    losses.fetch()
    return losses.state


def feed(losses: PictureLosses, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        losses.begin()
        indices = [(step * PER_STEP + place) % NUM for place in range(PER_STEP)]
        losses.add([Sample(index, f"{step}/{index}") for index in indices], loss_of(indices, generator))
        losses.keep()


def test_hard_pictures_come_first_with_their_ratio_whatever_noise_levels_they_drew() -> None:
    losses = PictureLosses(NUM, {})
    feed(losses, range(300))
    fits = picture_fits(state_of(losses))
    assert [fit.index for fit in fits[:2]] == [3, 7]
    usual = fits[NUM // 2].ratio
    assert fits[0].ratio / usual == pytest.approx(2.0, rel=0.15)
    assert [fit.outlying for fit in fits] == [True, True] + [False] * (NUM - 2)
    assert all(fit.uses == 60 for fit in fits)


def test_resumed_collection_equals_the_unbroken_one_bit_for_bit() -> None:
    whole = PictureLosses(NUM, {})
    feed(whole, range(20))
    first = PictureLosses(NUM, {})
    feed(first, range(13))
    state = json.loads(json.dumps(state_of(first)))  # as a checkpoint keeps it
    second = PictureLosses(NUM, state)
    feed(second, range(13, 20))
    assert state_of(second) == state_of(whole)


def test_step_that_is_left_out_or_begun_again_does_not_count() -> None:
    losses = PictureLosses(NUM, {})
    feed(losses, range(5))
    before = state_of(losses)
    losses.begin()
    losses.add([Sample(0, "a")], Loss(torch.tensor(99.0), 1, torch.tensor([99.0]), torch.tensor([0.5])))
    losses.begin()  # memory ran out, or the step was refused
    losses.keep()
    assert state_of(losses) == before


def test_checkpoint_without_losses_tells_nothing() -> None:
    assert picture_fits({}) == []


def test_picture_that_was_hardly_used_is_not_judged() -> None:
    losses = PictureLosses(NUM, {})
    feed(losses, range(NUM // PER_STEP))
    assert picture_fits(state_of(losses)) == []


def test_losses_without_noise_levels_are_compared_as_they_are() -> None:
    losses = PictureLosses(3, {})
    for _ in range(4):
        losses.begin()
        values = torch.tensor([1.0, 1.0, 4.0])
        losses.add([Sample(index, "") for index in range(3)], Loss(values.sum(), 3, values))
        losses.keep()
    worst = picture_fits(state_of(losses))[0]
    assert worst.index == 2
    assert worst.ratio == pytest.approx(4 ** (2 / 3))
