"""Regularization pictures: mixed into every epoch, weighed, and left out of all that is said of what is learnt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import draw_pictures
from helpers import seen
from helpers.checked_sets import check, found
from helpers.commands import train
from lora_scripts.config import RunConfig
from lora_scripts.data.dataset import open_dataset
from lora_scripts.data.sampler import StepPlan, mean_uses

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Three pictures of other things, all with the caption of their kind."""
    folder = draw_pictures(tmp_path / "others", 11)
    for number in range(8):  # drawn like the training pictures
        (folder / f"{number:02d}.png").unlink()
    rows = [f"{number:02d}.png,a drawing\n" for number in (8, 9, 10)]
    (folder / "metadata.csv").write_text("".join(["filename,prompt\n", *rows]), "utf-8")
    return folder


def opened(values: dict[str, Any]) -> Any:
    return open_dataset(RunConfig.model_validate(values), (64, 64))


def uses_of(plan: StepPlan, epoch: int) -> list[Any]:
    return [use for step in plan.epoch(epoch) for use in step]


def test_epoch_has_as_many_of_them_as_of_the_others(settings: Settings, others: Path) -> None:
    data = opened(settings(folders=[{"path": str(others), "regularization": True}], repeats=2))
    plan = StepPlan.of(data.examples, 4, seed=1)
    assert plan.uses_per_epoch == 32
    assert plan.steps_per_epoch == 8
    for epoch in range(3):
        uses = uses_of(plan, epoch)
        counts = Counter(data.examples[use.index].is_regularization for use in uses)
        assert counts == {True: 16, False: 16}
        assert len({use.key for use in uses}) == len(uses)
        assert len(plan.epoch(epoch)) == plan.steps_per_epoch
    # Three pictures share sixteen uses as evenly as can be, and over three epochs exactly.
    times = Counter(use.index for epoch in range(3) for use in uses_of(plan, epoch) if use.index >= 8)
    assert set(times.values()) == {16}
    assert mean_uses(data.examples) == [2.0] * 8 + [16 / 3] * 3


def test_epochs_take_turns_among_more_pictures_than_one_can_hold() -> None:
    names = [*"ab", *"uvwxyz"]
    plan = StepPlan(names, [(64, 64)] * 8, [1] * 8, 2, seed=0, regularization=range(2, 8))
    epochs = [{names[use.index] for use in uses_of(plan, epoch)} - {"a", "b"} for epoch in range(4)]
    assert epochs == [{"u", "v"}, {"w", "x"}, {"y", "z"}, {"u", "v"}]


def test_they_get_no_trigger_word_and_are_never_held_out(settings: Settings, others: Path) -> None:
    values = settings(
        folders=[{"path": str(others), "regularization": True}],
        trigger_word="sks",
        validation_pictures=4,
        save_steps=6,
        sample_every=6,
        sample_steps=1,
    )
    kept = seen.train(values)
    told = "\n".join(kept.notes)
    assert "8 of 8 pictures train." in told
    assert "3 of 3 regularization pictures are mixed in." in told
    assert "4 pictures are held out to measure the validation loss, 4 train" in told
    run = Path(values["output_dir"])
    log = (run / "train.log").read_text("utf-8")
    assert "others: 3 pictures, weight 1: 4 uses an epoch, as many as of the others" in log
    held_out = next(note for note in kept.notes if "are held out" in note)
    assert "others/" not in held_out
    record = [json.loads(line) for line in (run / "record.jsonl").read_text("utf-8").splitlines()]
    captions = next(entry["captions"] for entry in record if "captions" in entry)
    assert len(captions) == 4
    assert all(caption.startswith("sks, ") for _, caption in captions)
    with safe_open(run / "run.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_num_train_images"], header["ss_num_reg_images"]) == ("4", "3")
    assert json.loads(header["ss_reg_dataset_dirs"]) == {"others": {"n_repeats": 1, "img_count": 3}}
    assert list(json.loads(header["ss_dataset_dirs"])) == ["pictures"]
    assert "a drawing" not in header["ss_tag_frequency"]
    report = (run / "report.html").read_text("utf-8")
    assert "<td>others</td><td>regularization</td><td>3</td><td>4</td><td>-</td><td>1</td>" in report


def test_their_weight_scales_their_losses_alone(settings: Settings, others: Path, tmp_path: Path) -> None:
    losses = {}
    for weight in (1.0, 0.25, 1e-6):
        entry = {"path": str(others), "regularization": True, "weight": weight}
        values = settings(
            folders=[entry],
            batch_size=16,
            max_steps=1,
            min_snr_gamma=0,
            validation_pictures=0,
            output_dir=str(tmp_path / f"{weight}"),
        )
        losses[weight] = seen.train(values).reports[0].losses[0]
    learnt = losses[1e-6]
    assert 0 < learnt < losses[1.0]
    assert losses[0.25] == pytest.approx(learnt + 0.25 * (losses[1.0] - learnt), rel=1e-4)


def test_stopped_run_with_them_resumes_to_the_same_bits(settings: Settings, others: Path, tmp_path: Path) -> None:
    entry = {"path": str(others), "regularization": True, "weight": 0.5}
    changes = {"folders": [entry], "save_precision": "fp32", "max_steps": 10, "flip": True}
    weights = []
    for name, stops in (("a", ()), ("b", (3, 7))):
        values = settings(output_dir=str(tmp_path / name / "run"), **changes)
        for stop in stops:
            seen.train(values, seen.StopAfter(stop))
        seen.train(values)
        weights.append(load_file(Path(values["output_dir"]) / "run.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_check_names_copies_trigger_words_and_how_often_they_come(pictures: Path, others: Path) -> None:
    (others / "copy.png").write_bytes((pictures / "03.png").read_bytes())
    with Image.open(pictures / "05.png") as image:
        image.convert("RGB").save(others / "again.jpg", quality=95)
    with (others / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write("copy.png,a sks drawing\nagain.jpg,a drawing\n")
    report = check(pictures, folders=[{"path": others, "regularization": True}], trigger_word="sks")
    copies = found(report, "regularization-copies")
    assert copies.details == {"others/copy.png": "the same file as 03.png", "others/again.jpg": "nearly 05.png"}
    assert found(report, "regularization-trigger").names == ["others/copy.png"]
    assert "5 regularization pictures for 8 uses" in found(report, "regularization").text
    codes = {finding.code for finding in report.findings}
    assert not codes & {"exact-duplicates", "near-duplicates", "captions-duplicate", "captions-all-same"}


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"trigger_word": "sks"}, "entry 1: trigger_word: has no effect because regularization pictures never get one"),
        ({"weight": -1}, "entry 1: weight: should be greater than 0"),
    ],
)
def test_settings_without_effect_are_refused(
    entry: Any, text: str, settings: Settings, others: Path, tmp_path: Path, capsys: Any
) -> None:
    values = settings(folders=[{"path": str(others), "regularization": True, **entry}])
    code, _, err = train(values, tmp_path, capsys)
    assert code == 2
    assert text in err


def test_nothing_but_regularization_is_refused(settings: Settings, others: Path, tmp_path: Path, capsys: Any) -> None:
    values = settings(folders=[{"path": str(others), "regularization": True}])
    del values["train_data_dir"]
    code, _, err = train(values, tmp_path, capsys)
    assert code == 2
    assert "every entry is for regularization, so there is nothing to learn" in err
