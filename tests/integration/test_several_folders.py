"""Runs on several folders of pictures, each with captions, repeats, trigger word and weight of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from conftest import draw_pictures
from helpers import seen
from helpers.commands import command, train
from lora_scripts.config import RunConfig
from lora_scripts.data.dataset import open_dataset
from lora_scripts.errors import DataError

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Four more pictures, in a folder that is called like the first one."""
    return draw_pictures(tmp_path / "more" / "pictures", 4)


def opened(values: dict[str, Any]) -> Any:
    return open_dataset(RunConfig.model_validate(values), (64, 64))


def test_names_stay_unique_and_settings_are_each_folders_own(settings: Settings, second: Path) -> None:
    entry = {"path": str(second), "repeats": 3, "trigger_word": "zwx", "weight": 0.5}
    data = opened(settings(folders=[entry], repeats=2, trigger_word="sks"))
    assert [each.name for each in data.examples] == [
        *(f"{n:02d}.png" for n in range(8)),
        *(f"pictures-2/{n:02d}.png" for n in range(4)),
    ]
    first, last = data.examples[0], data.examples[-1]
    assert (first.repeats, first.weight, last.repeats, last.weight) == (2, 1.0, 3, 0.5)
    assert first.caption.startswith("sks, ")
    assert last.caption.startswith("zwx, ")


def test_folders_can_stand_in_place_of_train_data_dir(settings: Settings, pictures: Path, second: Path) -> None:
    values = settings(folders=[str(pictures), {"path": str(second), "name": "others", "trigger_word": ""}])
    del values["train_data_dir"]
    data = opened(values | {"trigger_word": "sks"})
    assert {each.name.split("/")[0] for each in data.examples} == {"pictures", "others"}
    assert [each.caption.startswith("sks") for each in data.examples] == [True] * 8 + [False] * 4
    assert RunConfig.model_validate(values).data_dir == pictures  # where the cache goes


def test_folder_inside_another_is_not_read_twice(settings: Settings, pictures: Path) -> None:
    inside = draw_pictures(pictures / "close", 3)
    data = opened(settings(folders=[{"path": str(inside), "repeats": 5}]))
    assert [each.name for each in data.examples if "/" in each.name] == [f"close/{n:02d}.png" for n in range(3)]
    assert [each.repeats for each in data.examples] == [1] * 8 + [5] * 3


def test_name_of_an_entry_that_a_subfolder_has_is_refused(settings: Settings, pictures: Path, second: Path) -> None:
    draw_pictures(pictures / "others", 2)
    (pictures / "metadata.csv").unlink()
    with pytest.raises(DataError, match=r"two pictures would be called others/00\.png"):
        opened(settings(folders=[{"path": str(second), "name": "others"}]))


def test_caption_of_an_entry_is_for_pictures_without_one(settings: Settings, second: Path) -> None:
    table = second / "metadata.csv"
    table.write_text("filename,prompt\n00.png,a red cat\n01.png,\n", "utf-8")
    data = opened(settings(folders=[{"path": str(second), "caption": "a drawing"}]))
    assert [each.caption for each in data.examples if each.folder == "pictures-2"] == ["a red cat", *["a drawing"] * 3]


def test_missing_and_empty_folders_are_named_with_their_entry(settings: Settings, tmp_path: Path, capsys: Any) -> None:
    nothing = tmp_path / "nothing"
    values = settings(folders=[str(nothing), str(tmp_path / "typo")])
    code, _, err = train(values, tmp_path, capsys)
    assert code == 2
    assert f"folders entry 1: {nothing}: no such folder" in err
    assert "folders entry 2" in err
    nothing.mkdir()
    code, _, err = train(settings(folders=[str(nothing)]), tmp_path, capsys)
    assert code == 2
    assert f"folders entry 1: {nothing}: holds no pictures" in err
    code, out, _ = command(capsys, "check", "--config", tmp_path / "my.yaml", "--no-model")
    assert code == 2
    assert f"folders entry 1: {nothing}: holds no pictures" in out


@pytest.mark.parametrize(
    ("folders", "text"),
    [
        ([{"path": "a", "weight": 0}], "entry 1: weight: should be greater than 0"),
        ([{"path": "a", "wieght": 1}], "entry 1: wieght: no such setting"),
        ([{"path": "a", "name": "x/y"}], "entry 1: name: 'x/y' holds characters"),
        (["a", "./a"], "entry 2: is the same folder as entry 1"),
        ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], "entry 2: name: entry 1 is called 'x' too"),
    ],
)
def test_wrong_entries_are_refused(folders: Any, text: str, settings: Settings, tmp_path: Path, capsys: Any) -> None:
    code, _, err = train(settings(folders=folders), tmp_path, capsys)
    assert code == 2
    assert text in err


def test_settings_that_every_entry_overrides_are_refused(settings: Settings, tmp_path: Path, capsys: Any) -> None:
    values = settings(folders=[{"path": "a", "repeats": 2, "trigger_word": "x"}], repeats=3, trigger_word="y")
    del values["train_data_dir"]
    code, _, err = train(values | {"metadata_path": "m.csv"}, tmp_path, capsys)
    assert code == 2
    for setting in ("repeats", "trigger_word", "metadata_path"):
        assert f"{setting}: has no effect because" in err
    del values["folders"]
    assert "train_data_dir: is missing; every run needs it" in train(values, tmp_path, capsys)[2]


def test_run_log_report_and_file_tell_the_folders(
    settings: Settings, second: Path, tmp_path: Path, capsys: Any
) -> None:
    entry = {"path": str(second), "repeats": 2, "trigger_word": "zwx"}
    values = settings(folders=[entry], trigger_word="sks", validation_pictures=0)
    code, _out, err = train(values, tmp_path, capsys)
    assert code == 0, err
    run = Path(values["output_dir"])
    log = (run / "train.log").read_text("utf-8")
    assert "pictures: 8 pictures, trigger word sks; pictures-2: 4 pictures, 8 uses an epoch, trigger word zwx" in log
    with safe_open(run / "run.safetensors", "pt") as file:
        header = file.metadata()
    assert json.loads(header["ss_dataset_dirs"]) == {
        "pictures": {"n_repeats": 1, "img_count": 8},
        "pictures-2": {"n_repeats": 2, "img_count": 4},
    }
    tags = json.loads(header["ss_tag_frequency"])
    assert tags["pictures"]["sks"] == 8
    assert tags["pictures-2"]["zwx"] == 4
    assert "zwx" not in tags["pictures"]
    assert header["modelspec.trigger_phrase"] == "sks, zwx"
    report = (run / "report.html").read_text("utf-8")
    assert "<td>pictures-2</td><td>to be learnt</td><td>4</td><td>8</td><td>zwx</td>" in report

    # Moved elsewhere under the same name it is the same run; other repeats are not.
    moved = second.parent / "pictures-2"
    second.rename(moved)
    code, _, err = train(values | {"folders": [entry | {"path": str(moved)}]}, tmp_path, capsys)
    assert code == 0, err
    code, _, err = train(values | {"folders": [entry | {"path": str(moved), "repeats": 3}]}, tmp_path, capsys)
    assert code == 2
    assert "pictures-2/00.png: was" in err
    assert "repeats 3" in err


def test_weight_of_a_folder_scales_its_share_of_the_loss(settings: Settings, tmp_path: Path) -> None:
    values = settings(batch_size=8, max_steps=1, min_snr_gamma=0, validation_pictures=0)
    path = values.pop("train_data_dir")
    losses = {}
    for weight in (1.0, 0.5):
        run = {"folders": [{"path": path, "weight": weight}], "output_dir": str(tmp_path / f"{weight}")}
        losses[weight] = seen.train(values | run).reports[0].losses[0]
    assert losses[0.5] == pytest.approx(losses[1.0] / 2, rel=1e-6)
