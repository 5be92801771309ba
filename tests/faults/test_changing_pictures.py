"""Pictures that are damaged, replaced or removed before a run, between its listing and its reading, and afterwards."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from helpers import commands
from lora_scripts.config import RunConfig
from lora_scripts.errors import DataError
from lora_scripts.pipeline import Outcome
from lora_scripts.train_command import train_and_report
from lora_scripts.training.events import Listener

Settings = Callable[..., dict[str, Any]]


def draw(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A hundred pictures, so that 2 % of them are two."""
    folder = tmp_path / "many"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "prompt"])
        for number in range(100):
            draw(folder / f"{number:02d}.png", number)
            rows.writerow([f"{number:02d}.png", "noise"])
    return folder


class Meddler(Listener):
    """Does something to the folder after the pictures were listed and before the first is decoded, or after training began."""

    def __init__(self, meddle: Callable[[], object], at: str) -> None:
        self.meddle, self.at = meddle, at
        self.notes: list[str] = []

    def progress(self, what: str, done: int, total: int) -> None:
        if self.at == "reading" and what == "latents" and done == 0:
            self.meddle()

    def ticked(self, step: int) -> None:
        if self.at == "training" and step == 1:
            self.meddle()

    def note(self, text: str, level: str = "info") -> None:
        self.notes.append(text)


def train(values: dict[str, Any], *more: Listener) -> Outcome:
    return train_and_report(RunConfig.model_validate(values), more=more)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def entries(folder: Path) -> int:
    return sum(1 for _ in (folder / ".cache" / "latents").rglob("*.safetensors"))


@pytest.mark.fault(7)
def test_picture_cut_short_is_named_before_the_first_step_and_the_rest_trains(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(pictures / "03.png")
    code, out, err = commands.train(settings(max_steps=2), tmp_path, capsys)
    assert code == 0, err
    assert "7 of 8 pictures train." in out
    assert (
        "left out: 03.png: cannot be decoded (truncated file). Replace it, or leave it out with exclude: 03.png." in out
    )
    log = (tmp_path / "run" / "train.log").read_text("utf-8")
    assert log.index("03.png: cannot be decoded") < log.index("step 1/2")


@pytest.mark.fault(7)
def test_folder_of_damaged_pictures_alone_ends_with_2_and_every_reason(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in pictures.glob("*.png"):
        cut(path)
    code, _, err = commands.train(settings(), tmp_path, capsys)
    assert code == 2
    assert all(f"0{number}.png: cannot be decoded" in err for number in range(8))
    assert not (tmp_path / "run" / "run.safetensors").exists()


@pytest.mark.fault(8)
def test_two_percent_changed_before_reading_are_named_and_the_rest_trains(settings: Settings, many: Path) -> None:
    values = settings(train_data_dir=str(many), max_steps=1, validation_pictures=0)
    meddler = Meddler(lambda: (draw(many / "10.png", 999), (many / "20.png").unlink()), "reading")
    outcome = train(values, meddler)
    assert outcome.complete
    reasons = {item.name: item.reason for item in outcome.dataset.left_out}
    assert reasons == {
        "10.png": "was changed while the run was reading the pictures",
        "20.png": "no such file. Was it moved or renamed?",
    }
    assert "98 of 100 pictures train." in meddler.notes
    # Nothing of the new picture was filed under the digest of the old one.
    assert entries(many) == 98


@pytest.mark.fault(8)
def test_which_pictures_take_the_places_follows_from_those_that_are_left(
    settings: Settings, many: Path, tmp_path: Path
) -> None:
    first = settings(
        train_data_dir=str(many), output_dir=str(tmp_path / "a" / "run"), max_steps=2, validation_pictures=0
    )
    train(first, Meddler((many / "20.png").unlink, "reading"))
    # The run that lost it is that of a folder that never had it.
    second = first | {"output_dir": str(tmp_path / "b" / "run")}
    train(second)
    one, other = (load_file(Path(values["output_dir"]) / "run.safetensors") for values in (first, second))
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.fault(8)
@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: draw(path, 999)], ids=["cut", "removed", "replaced"])
def test_more_than_two_percent_changed_before_reading_stops_the_run(
    settings: Settings, many: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    values = settings(train_data_dir=str(many), max_steps=1, validation_pictures=0)
    with pytest.raises(DataError, match=r"(?s)3 of 100 pictures changed since the run began, more than 2%:.*05\.png"):
        train(values, Meddler(lambda: [damage(many / f"0{number}.png") for number in (5, 6, 7)], "reading"))
    assert not (tmp_path / "run" / "run.safetensors").exists()
    assert "pictures changed since the run began" in (tmp_path / "run" / "train.log").read_text("utf-8")
    # The same command, once the folder is at rest, trains.
    for number in (5, 6, 7):
        draw(many / f"0{number}.png", number)
    assert train(values).complete


@pytest.mark.fault(8)
def test_pictures_removed_during_training_are_not_missed(settings: Settings, pictures: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in pictures.glob("*.png")}
    calm = settings(output_dir=str(tmp_path / "a" / "run"), sample_every=2, sample_steps=1, sample_prompts=["a cat"])
    train(calm)
    troubled = calm | {"output_dir": str(tmp_path / "b" / "run")}
    assert train(troubled, Meddler(lambda: [path.unlink() for path in before], "training")).complete
    one, other = (load_file(Path(values["output_dir"]) / "run.safetensors") for values in (calm, troubled))
    assert all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.fault(8)
def test_run_resumed_after_a_picture_was_replaced_shows_the_difference(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: Mapping[str, Any] = settings(max_steps=2)
    assert commands.train(dict(values), tmp_path, capsys)[0] == 0
    draw(pictures / "03.png", 5)
    code, _, err = commands.train(dict(values), tmp_path, capsys)
    assert code == 2
    assert "03.png" in err
    assert (tmp_path / "run" / "run.safetensors").is_file()
