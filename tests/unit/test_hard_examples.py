"""What is said of the pictures that are fitted worst."""

from __future__ import annotations

from pathlib import Path

from lora_scripts.data.buckets import fit_into
from lora_scripts.data.dataset import Example
from lora_scripts.hard_examples import MOST, hard_examples, named
from lora_scripts.training.picture_losses import NUM_BINS
from lora_scripts.words import PICTURES

NUM = 12


def collected(logs: dict[int, float]) -> dict[str, object]:
    """As a run collects them: ten losses of each picture in one part of the noise range, all alike but for the given ones."""
    fits = [logs.get(index, 0.01 * (index % 3)) for index in range(NUM)]
    bins = [[0, 0.0, 0.0] for _ in range(NUM_BINS)]
    bins[4] = [10 * NUM, 10 * sum(fits), 10 * sum(fit**2 for fit in fits)]
    counts = [" ".join("10" if bin_ == 4 else "0" for bin_ in range(NUM_BINS)) for _ in fits]
    return {"bins": bins, "sums": [10 * fit for fit in fits], "counts": counts}


EXAMPLES = [
    Example(f"{n}.png", Path(f"{n}.png"), (64, 64), fit_into((64, 64), [(64, 64)]), f"caption {n}", 1, str(n))
    for n in range(NUM)
]


def test_outlying_pictures_are_named_and_others_are_not() -> None:
    worst = hard_examples(collected({5: 1.0, 8: 0.7}), EXAMPLES, {}, PICTURES)
    assert [each.example.name for each in worst[:2]] == ["5.png", "8.png"]
    assert len(worst) == MOST
    told = "\n".join(named(worst, PICTURES))
    assert "5.png: loss" in told
    assert "8.png" in told
    assert told.count(".png") == 2


def test_pictures_that_are_all_alike_are_not_named() -> None:
    assert named(hard_examples(collected({}), EXAMPLES, {}, PICTURES), PICTURES) == []


def test_hint_follows_what_clip_says_of_the_caption() -> None:
    losses = collected({5: 1.0, 8: 0.7})
    wrong, right = hard_examples(losses, EXAMPLES, {"5.png": 0.2, "8.png": 1.0}, PICTURES)[:2]
    assert wrong.hint == "By CLIP, 80% of the other captions fit it better: is the caption right?"
    assert right.hint.startswith("By CLIP its caption fits")


def test_run_without_collected_losses_names_nothing() -> None:
    assert hard_examples({}, EXAMPLES, {}, PICTURES) == []
