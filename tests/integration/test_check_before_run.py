"""The check that every training run begins with: what it stops, what it lets through, where its findings stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import commands
from helpers.checked_sets import write_captions
from helpers.seen import Seen, StopAfter, train
from lora_scripts.errors import DataError, ResumeError
from lora_scripts.preflight.before_run import is_measured

Settings = Callable[..., dict[str, Any]]
FEW_CAPTIONS = "5 of 8 pictures have no caption; 5 of them would not train."


@pytest.fixture
def spoilt(pictures: Path) -> Path:
    """The folder of eight pictures, of which three have captions: something red."""
    write_captions(pictures, {"00.png": "a cat", "01.png": "a dog", "02.png": "a fish"})
    return pictures


def no_room(patch: pytest.MonkeyPatch) -> None:
    """Lets the check believe that the disk is full; what is written still finds room."""
    patch.setattr("lora_scripts.preflight.disk.free_bytes", lambda folder: 1000)


def test_bad_folder_is_refused_before_anything_is_encoded(
    settings: Settings, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = commands.train(settings(), tmp_path, capsys)
    assert code == 2
    assert FEW_CAPTIONS in err
    assert f"lora-scripts label --input {spoilt} --output {spoilt / 'metadata.csv'}" in err
    assert err.rstrip().endswith("The run was not started. --force starts it all the same.")
    assert FEW_CAPTIONS not in out  # said once
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"train.log", "record.jsonl"}
    assert FEW_CAPTIONS in (tmp_path / "run" / "train.log").read_text("utf-8")
    assert [path.name for path in (spoilt / ".cache").iterdir()] == ["facts"]


def test_refused_run_tells_which_rows_fitted_no_picture(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_captions(pictures, {"00.png": "a cat", **{f"cat_{i}.png": "a cat" for i in range(1, 8)}})
    code, out, err = commands.train(settings(batch_size=1), tmp_path, capsys)
    assert code == 2
    assert "7 of 8 pictures have no caption" in err
    assert "metadata.csv: no use for 'cat_1.png'" in out


def test_force_trains_all_the_same_and_shows_what_is_red(
    settings: Settings, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = commands.train(settings(max_steps=2), tmp_path, capsys, options=["--force"])
    assert code == 0, err
    assert f"warning: {FEW_CAPTIONS} Pictures: 03.png, 04.png, 05.png, 06.png and 1 more." in out
    assert "warning: The check found 1 red finding; --force starts the run all the same." in out
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert report.count(FEW_CAPTIONS) == 1
    assert "1 red finding, trained all the same" in report


def test_amber_finding_stops_nothing_and_stands_in_console_log_and_report(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "03.png").write_bytes((pictures / "02.png").read_bytes())
    code, out, err = commands.train(settings(max_steps=2), tmp_path, capsys)
    assert code == 0, err
    said = "1 picture is the same file as another one, so that one weighs more."
    assert f"warning: {said} Pictures: 03.png (the same file as 02.png)." in out
    assert said in (tmp_path / "run" / "train.log").read_text("utf-8")
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert report.count(said) == 1
    assert "<td><div>03.png" in report
    assert "Keep the best of each" in report


def test_second_start_decodes_no_picture_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(settings(max_steps=1))
    monkeypatch.delattr("lora_scripts.preflight.gather.measure")
    monkeypatch.delattr("lora_scripts.data.encoded._load")
    again = train(settings(max_steps=1, output_dir=f"{settings()['output_dir']}-again"))
    assert [report.losses for report in again.reports] == [report.losses for report in first.reports]


def test_check_changes_no_number_of_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"lora_dropout": 0.2, "caption_dropout": 0.3}
    plain = train(settings(**changes))
    # A run on a graphics card measures a step; the generators, weights and gradients must be as before.
    monkeypatch.setattr("lora_scripts.preflight.before_run.is_measured", lambda device, goes_on: True)
    measured = train(settings(**changes, output_dir=str(tmp_path / "measured")))
    assert any("Predicted: about" in note for note in measured.notes)
    assert [report.losses for report in measured.reports] == [report.losses for report in plain.reports]


def test_full_disk_stops_a_run_that_begins_and_not_one_that_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        no_room(patch)
        with pytest.raises(DataError, match="The run will write about"):
            train(settings())
    train(settings(), StopAfter(2))
    no_room(monkeypatch)
    seen = train(settings())
    assert [report.step for report in seen.reports] == [3, 4, 5, 6]
    assert any(note.startswith("The run will write about") for note in seen.notes)
    assert "The check found 1 red finding; a run that goes on is not stopped." in seen.notes


def test_forced_run_goes_on_without_force(
    settings: Settings, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.train(settings(max_steps=2), tmp_path, capsys, options=["--force"])[0] == 0
    code, out, err = commands.train(settings(max_steps=2), tmp_path, capsys)
    assert code == 0, err
    assert f"warning: {FEW_CAPTIONS}" in out


def test_picture_damaged_since_the_run_began_is_refused_where_it_resumes(settings: Settings, pictures: Path) -> None:
    train(settings(), StopAfter(2))
    (pictures / "03.png").write_bytes(b"")
    with pytest.raises(ResumeError, match=r"03\.png: was"):
        train(settings())


def test_report_of_a_mended_run_has_nothing_of_its_refusal(settings: Settings, spoilt: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 of 8 pictures"):
        train(settings(max_steps=2))
    write_captions(spoilt, {f"{i:02d}.png": f"a drawn thing {i}" for i in range(8)})
    train(settings(max_steps=2))
    report = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "have no caption" not in report
    assert "The run was not started" not in report


def test_slightly_enlarged_pictures_are_named(settings: Settings) -> None:
    seen: Seen = train(settings(max_steps=1, resolution=72, bucket_step=8))
    (line,) = [note for note in seen.notes if "enlarged a little" in note]
    assert "01.png (64x64, enlarged to 72x72)" in line


def test_step_is_measured_on_a_graphics_card_and_only_when_a_run_begins() -> None:
    assert is_measured(torch.device("cuda"), goes_on=False)
    assert not is_measured(torch.device("cuda"), goes_on=True)
    assert not is_measured(torch.device("cpu"), goes_on=False)
