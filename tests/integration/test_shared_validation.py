"""The validation loss on several processes: each measures its share, and all know what one would have measured."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conftest import draw_pictures
from helpers import measured_passes
from helpers.launched import launched

Settings = Callable[..., dict[str, Any]]
STEPS = {"max_steps": 4, "validate_every": 2, "save_steps": 4, "learning_rate": 1e-3}


def measured(values: dict[str, Any], num_processes: int) -> list[dict[str, Any]]:
    """What each process of a run wrote down."""
    out = Path(values["output_dir"])
    out.mkdir()
    settings = out.with_suffix(".json")
    settings.write_text(json.dumps(values), "utf-8")
    launched(measured_passes, num_processes, str(settings), str(out))
    return [json.loads((out / f"measured-{index}.json").read_text("utf-8")) for index in range(num_processes)]


def losses(found: dict[str, Any]) -> torch.Tensor:
    """[measurements,2,examples] of held-out and of training examples."""
    return torch.tensor([[each["held_out"], each["trained"]] for each in found["validations"]])


def uses(*found: dict[str, Any]) -> Counter[str]:
    return Counter(key for each in found for keys in each["passes"] for key in keys)


def test_two_processes_measure_half_of_the_pictures_each(settings: Settings, tmp_path: Path) -> None:
    pictures = STEPS | {"train_data_dir": str(draw_pictures(tmp_path / "twelve", 12)), "validation_pictures": 3}
    (one,) = measured(settings(output_dir=str(tmp_path / "one"), batch_size=4, **pictures), 1)
    both = measured(settings(output_dir=str(tmp_path / "two"), batch_size=2, **pictures), 2)
    assert losses(one).shape == (3, 2, 3)
    for each in both:
        torch.testing.assert_close(losses(each), losses(one), rtol=0, atol=1e-6)
        assert uses(each).total() == uses(one).total() / 2
    assert uses(*both) == uses(one)


def test_in_shards_all_make_the_same_number_of_passes(language_settings: Settings, tmp_path: Path) -> None:
    dialogues = STEPS | {"validation_dialogues": 4}
    (one,) = measured(language_settings(output_dir=str(tmp_path / "one"), **dialogues | {"batch_size": 3}), 1)
    changes = dialogues | {"batch_size": 1, "shard_model": True}
    three = measured(language_settings(output_dir=str(tmp_path / "three"), **changes), 3)
    assert losses(one).shape == (3, 2, 4)
    for each in three:
        torch.testing.assert_close(losses(each), losses(one), rtol=0, atol=1e-6)
        assert len(each["passes"]) == 3 * 3  # three measurements of eight dialogues: 3, 3 and 2, so one pass is lent
    assert not uses(one) - uses(*three)
    assert (uses(*three) - uses(one)).total() == 3
