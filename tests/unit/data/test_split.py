"""Which pictures are held out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lora_scripts.data.buckets import Fit
from lora_scripts.data.captions import CaptionSettings
from lora_scripts.data.dataset import Dataset, Example
from lora_scripts.data.encoded import EncodedDataset
from lora_scripts.data.split import num_held_out, split
from lora_scripts.errors import DataError

FIT = Fit(bucket=(64, 64), scaled=(64, 64), left=0, top=0)


def data(contents: list[str]) -> EncodedDataset:
    examples = [
        Example(f"{i}.png", Path(f"{i}.png"), (64, 64), FIT, text, 1, hashlib.sha256(text.encode()).hexdigest())
        for i, text in enumerate(contents)
    ]
    images = {(i, False): {} for i in range(len(examples))}
    return EncodedDataset(Dataset(examples), CaptionSettings(False, ",", 1, 0.0, 1, 0), False, images, {})


def held_out(contents: list[str]) -> set[str]:
    part = split(data(contents), "auto").held_out
    assert part is not None
    return {example.caption for example in part.dataset.examples}


def test_adding_a_picture_moves_at_most_one_place() -> None:
    contents = [f"picture {i}" for i in range(60)]
    before = held_out(contents)
    for extra in range(20):
        assert len(before - held_out([f"new {extra}", *contents])) <= 1


def test_parts_are_disjoint_and_whole() -> None:
    contents = [f"picture {i}" for i in range(30)]
    parts = split(data(contents), 5)
    train = {example.caption for example in parts.train.dataset.examples}
    assert parts.held_out is not None
    out = {example.caption for example in parts.held_out.dataset.examples}
    assert (len(out), train | out, train & out) == (5, set(contents), set())
    assert len(set(parts.reference)) == 5


def test_copies_of_a_picture_are_on_one_side() -> None:
    contents = [f"picture {i % 15}" for i in range(30)]
    parts = split(data(contents), 3)
    assert parts.held_out is not None
    train = {example.caption for example in parts.train.dataset.examples}
    assert not train & {example.caption for example in parts.held_out.dataset.examples}


def test_automatic_number() -> None:
    assert [num_held_out("auto", n) for n in (8, 11, 12, 50, 100, 1000)] == [0, 0, 2, 4, 8, 16]


def test_more_than_half_is_refused() -> None:
    with pytest.raises(DataError, match="validation_pictures: 9 of 12"):
        num_held_out(9, 12)
