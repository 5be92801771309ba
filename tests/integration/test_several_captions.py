"""Several captions of one picture: where they are read from, how one is drawn, and that all are encoded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import seen
from helpers.checked_sets import check, found
from helpers.commands import train
from lora_scripts.config import RunConfig
from lora_scripts.data.captions import CaptionSettings
from lora_scripts.data.dataset import open_dataset
from lora_scripts.data.metadata import read_captions, write_metadata

Settings = Callable[..., dict[str, Any]]


def only(folder: Path, *names: str) -> Path:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    return folder


def test_csv_columns_with_numbers_are_further_captions(pictures: Path) -> None:
    (pictures / "metadata.csv").write_text(
        "filename,prompt,prompt_3,prompt_2,note\n00.png,one,three,two,x\n01.png,one,,two,\n02.png,one,,,\n03.png,,,two,\n",
        "utf-8",
    )
    table = read_captions(pictures, None)
    assert table.more == {"00.png": ["two", "three"], "01.png": ["two"]}
    assert "2 pictures have several captions; every use of one draws one of them." in table.notes
    assert "03.png" not in table.captions  # the first column is the caption, for labelling too
    # They are the user's columns: a table that is written anew keeps them.
    write_metadata(pictures / "metadata.csv", table.captions, extra_columns=table.raw.extra_columns, extra=table.extra)
    assert read_captions(pictures, None).more == table.more


@pytest.mark.parametrize(
    "row", ['"prompt": ["one", " two ", ""]', '"text": "one", "text_2": "two"', '"caption": "one", "caption_2": "two"']
)
def test_jsonl_has_them_as_a_list_or_under_numbered_names(pictures: Path, row: str) -> None:
    only(pictures, "00.png")
    (pictures / "metadata.jsonl").write_text(f'{{"file_name": "00.png", {row}}}\n', "utf-8")
    table = read_captions(pictures, None)
    assert (table.captions, table.more) == ({"00.png": "one"}, {"00.png": ["two"]})


def test_lines_of_a_caption_file_are_several_captions_where_that_is_asked_for(
    settings: Settings, pictures: Path
) -> None:
    only(pictures, "00.png", "01.png")
    (pictures / "00.txt").write_bytes(b"a red cat\r\n\r\n a cat in the sun \r\n")
    (pictures / "01.txt").write_text("a dog\n", "utf-8")
    joined = open_dataset(RunConfig.model_validate(settings()), (64, 64))
    assert [each.captions for each in joined.examples] == [("a red cat a cat in the sun",), ("a dog",)]
    each = open_dataset(RunConfig.model_validate(settings(caption_per_line=True, trigger_word="sks")), (64, 64))
    assert [one.captions for one in each.examples] == [("sks, a red cat", "sks, a cat in the sun"), ("sks, a dog",)]


def test_every_use_draws_one_and_all_come_up_alike() -> None:
    settings = CaptionSettings.of(
        RunConfig.model_validate({"train_data_dir": "-", "base_model": "-", "output_dir": "-"})
    )
    captions = ("one", "two", "three")
    drawn = [settings.pick(captions, f"{epoch}/0/a.png") for epoch in range(3000)]
    assert drawn == [settings.pick(captions, f"{epoch}/0/a.png") for epoch in range(3000)]
    assert all(900 < times < 1100 for times in Counter(drawn).values())
    # Two repeats in one epoch draw apart, and measurements always see the first.
    pairs = {(settings.pick(captions, f"{n}/0/a"), settings.pick(captions, f"{n}/1/a")) for n in range(100)}
    assert len(pairs) == 9
    assert {replace(settings, several=False).pick(captions, f"{n}/0/a") for n in range(50)} == {"one"}


def test_orders_of_every_caption_are_encoded_ahead() -> None:
    values = {"train_data_dir": "-", "base_model": "-", "output_dir": "-"}
    settings = CaptionSettings.of(
        RunConfig.model_validate(values | {"caption_shuffle": True, "caption_variants": 3, "caption_dropout": 0.1})
    )
    captions = ("s, a, b, c, d", "s, e, f, g, h")
    asked = {settings.pick(captions, f"{epoch}/0/x") for epoch in range(500)}
    assert asked == set(settings.possible(captions))
    assert len(asked) == 2 * 3 + 1


def with_two_captions(pictures: Path) -> None:
    table = read_captions(pictures, None)
    rows = [f'{name},"{caption}","the other of {name}"' for name, caption in table.captions.items()]
    (pictures / "metadata.csv").write_text("\n".join(["filename,prompt,prompt_2", *rows]), "utf-8")


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_run_with_several_captions_resumes_to_the_same_bits(
    settings: Settings, pictures: Path, tmp_path: Path, train_text_encoder: bool
) -> None:
    with_two_captions(pictures)
    weights = []
    for name, stops in (("a", ()), ("b", (3,))):
        values = settings(
            output_dir=str(tmp_path / name / "run"), save_precision="fp32", train_text_encoder=train_text_encoder
        )
        for stop in stops:
            seen.train(values, seen.StopAfter(stop))
        told = seen.train(values)
        assert "8 pictures have several captions; every use of one draws one of them." in told.notes
        weights.append(load_file(Path(values["output_dir"]) / "run.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    texts = list((pictures / ".cache" / "text").rglob("*.safetensors"))
    assert len(texts) == (0 if train_text_encoder else 16)


def test_changed_further_caption_is_another_run(
    settings: Settings, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    with_two_captions(pictures)
    assert train(settings(), tmp_path, capsys)[0] == 0
    table = pictures / "metadata.csv"
    table.write_text(table.read_text("utf-8").replace('"the other of 03.png"', '""'), "utf-8")
    code, _, err = train(settings(), tmp_path, capsys)
    assert code == 2
    assert "03.png: was" in err
    assert "2 captions" in err


def test_check_finds_a_further_caption_that_is_cut(pictures: Path) -> None:
    with_two_captions(pictures)
    table = pictures / "metadata.csv"
    table.write_text(table.read_text("utf-8").replace("the other of 03.png", "the other " * 10 + "end"), "utf-8")
    finding = found(check(pictures, lambda caption: caption[:80]), "captions-too-long")
    assert list(finding.details) == ["03.png"]
    assert finding.details["03.png"].endswith("end'")
