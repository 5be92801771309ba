"""The labelling engine where something is wrong: bad files and names, too little memory, a stop, an output that cannot be."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.labelling import draw, rows, run
from lora_scripts.captioners.blip import Blip
from lora_scripts.captioners.label import LabelOptions
from lora_scripts.errors import DataError, ModelError


@pytest.mark.fault(7)
@pytest.mark.fault(20)
def test_row_7_and_20_bad_files_are_skipped_and_listed_with_reasons(options: LabelOptions) -> None:
    whole = (options.folder / "img0.png").read_bytes()
    (options.folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (options.folder / "drawing.svg").write_text("<svg/>", "utf-8")
    Image.new("RGB", (1, 1)).save(options.folder / "dot.png")
    (options.folder / "empty.jpg").touch()
    result = run(options)
    assert result.num_written == 6
    assert [failure.name for failure in result.failures] == ["cut.png", "dot.png", "drawing.svg", "empty.jpg"]
    for failure, reason in zip(result.failures, ("truncated file", "too small", "SVG", "empty"), strict=True):
        assert reason in failure.reason
    assert "cut.png" not in rows(options)


@pytest.mark.fault(7)
def test_with_damaged_pictures_alone_no_model_is_loaded(options: LabelOptions) -> None:
    run(options)
    (options.folder / "empty.jpg").touch()
    result = run(options, model="there/is-no-such-model")
    assert [failure.name for failure in result.failures] == ["empty.jpg"]


@pytest.mark.fault(7)
def test_copies_of_a_damaged_picture_fail_with_its_reason(options: LabelOptions) -> None:
    whole = (options.folder / "img0.png").read_bytes()
    for name in ("x1.png", "x2.png", "x3.png"):
        (options.folder / name).write_bytes(whole[:900])
    result = run(options)
    assert [failure.name for failure in result.failures] == ["x1.png", "x2.png", "x3.png"]
    assert all("truncated" in failure.reason for failure in result.failures)


@pytest.mark.fault(18)
def test_row_18_awkward_names_are_labelled_once_and_found_again(options: LabelOptions) -> None:
    names = [
        "猫 咪.png",
        "🐈.png",
        "50%.png",
        'a "quoted".png',
        "a,b.png",
        "CON.png",
        "=1+1.png",
        "é.png",
        "很" * 80 + ".png",
        "[b].png",
    ]
    for number, name in enumerate(names):
        draw(options.folder / "awkward" / name, 100 + number)
    draw(options.folder / "awkward" / "a.png", 200)
    Image.new("RGB", (40, 30), "red").save(options.folder / "awkward" / "a.jpg")
    assert run(options).num_written == 18
    found = rows(options)
    assert {f"awkward/{name}" for name in [*names, "a.png", "a.jpg"]} < set(found)
    assert found["awkward/a.png"] != found["awkward/a.jpg"]
    again = run(options, model="no/model")
    assert (again.num_kept, again.num_human, again.num_written) == (18, 0, 0)


@pytest.mark.fault(18)
@pytest.mark.skipif(os.name == "nt", reason="Windows names are always Unicode")
def test_row_18_a_name_that_is_no_unicode_is_listed_and_the_rest_is_labelled(options: LabelOptions) -> None:
    try:
        os.rename(os.fsencode(options.folder / "img0.png"), os.fsencode(options.folder) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system wants Unicode names")
    result = run(options)
    assert result.num_written == 5
    assert [failure.reason for failure in result.failures] == ["its name is not valid Unicode: rename the file"]


def test_lack_of_memory_halves_the_batch_and_loses_nothing(
    options: LabelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    write = Blip.write

    def short_of_memory(self: Blip, prepared, *rest):
        sizes.append(len(prepared))
        if len(prepared) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write(self, prepared, *rest)

    plain = rows_of_a_plain_run(options)
    monkeypatch.setattr(Blip, "write", short_of_memory)
    result = run(options, batch_size=6)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    assert result.num_written == 6
    assert rows(options) == plain


def rows_of_a_plain_run(options: LabelOptions) -> dict[str, str]:
    run(options)
    found = rows(options)
    for file in options.folder.glob("metadata*"):
        file.unlink()
    return found


def test_no_memory_for_a_single_picture_ends_with_the_reason_and_keeps_the_rest(
    options: LabelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Blip.write, []

    def short_of_memory(self: Blip, *args):
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write(self, *args)

    monkeypatch.setattr(Blip, "write", short_of_memory)
    with pytest.raises(ModelError, match="Not enough memory to caption a single picture"):
        run(options, batch_size=1)
    assert len(rows(options)) == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_saves_everything_and_goes_on(
    options: LabelOptions, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    plain = rows_of_a_plain_run(options)
    write, calls = Blip.write, []

    def interrupted(self: Blip, *args):
        calls.append(1)
        if len(calls) == 3:
            raise stop
        return write(self, *args)

    monkeypatch.setattr(Blip, "write", interrupted)
    if stop is KeyboardInterrupt:
        assert run(options).interrupted
    else:
        with pytest.raises(RuntimeError):
            run(options)
    assert len(rows(options)) == 4
    monkeypatch.undo()
    result = run(options)
    assert (result.num_kept, result.num_written) == (4, 2)
    assert rows(options) == plain


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_an_output_that_cannot_be_written_is_refused_before_any_work(options: LabelOptions, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    with pytest.raises(DataError, match="cannot be written"):
        run(options, output=tmp_path / "locked" / "metadata.csv", model="no/model")


def test_an_output_behind_a_link_is_refused_before_any_work(options: LabelOptions, tmp_path: Path) -> None:
    (tmp_path / "precious.csv").write_text("filename,prompt\n", "utf-8")
    os.symlink(tmp_path / "precious.csv", options.output)
    with pytest.raises(DataError, match="symbolic link"):
        run(options, model="no/model")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no pictures in it"),
        (lambda folder: folder.touch(), "is a file, not a folder"),
    ],
)
def test_a_folder_without_pictures_is_refused(
    options: LabelOptions, tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / "empty")
    with pytest.raises(DataError, match=reason):
        run(options, folder=tmp_path / "empty", output=tmp_path / "metadata.csv")


def test_the_table_is_a_csv(options: LabelOptions) -> None:
    with pytest.raises(DataError, match="captions are written as CSV"):
        run(options, output=options.folder / "metadata.jsonl")
