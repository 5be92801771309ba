"""The labelling engine with a small random BLIP: whose words stay, and what is written."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from helpers.labelling import Notes, draw, edit, rows, run
from lora_scripts.captioners.blip import Blip
from lora_scripts.captioners.label import LabelOptions, doubtful, label, preview, reapply_rules
from lora_scripts.captioners.protocol import CaptionerSettings
from lora_scripts.captioners.rules import Rules
from lora_scripts.captioners.side_file import SideFile


def test_every_picture_gets_a_row_in_natural_order(options: LabelOptions) -> None:
    draw(options.folder / "img10.png", 10)
    result = run(options)
    assert (result.num_pictures, result.num_written, result.num_kept, result.failures) == (7, 7, 0, [])
    assert list(rows(options)) == [f"img{number}.png" for number in (0, 1, 2, 3, 4, 5, 10)]
    assert all(rows(options).values())
    assert options.output.read_bytes().startswith(b"filename,prompt\n")


def test_captions_depend_on_the_picture_and_not_on_batches_or_order(options: LabelOptions, tmp_path: Path) -> None:
    run(options, batch_size=4)
    first = rows(options)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "z.png").write_bytes((options.folder / "img3.png").read_bytes())
    other = replace(options, folder=alone, output=alone / "metadata.csv", batch_size=1)
    run(other)
    assert rows(other)["z.png"] == first["img3.png"]


def test_the_side_file_holds_what_the_table_does_not(options: LabelOptions, models: Path) -> None:
    settings = CaptionerSettings(max_tokens=8, rank_model=str(models / "clip"))
    run(options, captioner="clip-blip", settings=settings, rules=Rules(trigger="mystyle"))
    record = SideFile.beside(options.output).records["img0.png"]
    assert rows(options)["img0.png"] == record.text == f"mystyle, {Rules().apply(record.caption)}"
    assert record.models == {"model": str(models / "blip"), "rank_model": str(models / "clip")}
    assert record.settings == {"captioner": "clip-blip", "decoding": "greedy", "prompt": "", "seed": 42}
    assert record.runner_up != record.caption
    assert record.score >= record.runner_up_score
    assert len(record.image_sha256) == 64
    assert 0 <= record.doubt <= 1
    with options.output.open(encoding="utf-8", newline="") as file:
        assert all(len(row) == 2 for row in csv.reader(file))


def test_only_missing_rows_are_filled(options: LabelOptions, models: Path) -> None:
    run(options)
    before = rows(options)
    draw(options.folder / "new.png", 77)
    edit(options, img2=None, img4="")
    result = run(options, model=str(models / "other"))
    assert (result.num_kept, result.num_written) == (4, 3)
    after = rows(options)
    assert {name: after[name] for name in ("img0.png", "img1.png", "img3.png", "img5.png")} == {
        name: before[name] for name in ("img0.png", "img1.png", "img3.png", "img5.png")
    }
    assert after["img2.png"] != before["img2.png"]
    assert after["new.png"]
    assert after["img4.png"]


def test_nothing_to_do_loads_no_model(options: LabelOptions) -> None:
    run(options)
    stamp = options.output.stat().st_mtime_ns
    result = run(options, model="there/is-no-such-model")
    assert (result.num_kept, result.num_written) == (6, 0)
    assert options.output.stat().st_mtime_ns == stamp


def test_overwrite_replaces_the_machines_captions_and_never_a_persons(options: LabelOptions, models: Path) -> None:
    run(options)
    before = rows(options)
    edit(options, img1="my own words, with a comma")
    result = run(options, overwrite=True, model=str(models / "other"))
    assert (result.num_written, result.num_kept, result.num_human) == (5, 1, 1)
    after = rows(options)
    assert after["img1.png"] == "my own words, with a comma"
    assert all(after[name] != before[name] for name in before if name != "img1.png")
    kept = options.output.with_name("metadata.csv.bak")
    assert "my own words" in kept.read_text("utf-8")
    again = run(options, overwrite=True)
    assert (again.num_written, again.num_human) == (5, 1)
    assert rows(options)["img1.png"] == "my own words, with a comma"


def test_a_table_without_side_file_is_a_persons_work(options: LabelOptions) -> None:
    options.output.write_text("filename,prompt\nimg0.png,by hand\n", "utf-8")
    result = run(options, overwrite=True)
    assert (result.num_written, result.num_human) == (5, 1)
    assert rows(options)["img0.png"] == "by hand"


def test_saving_the_table_in_a_spreadsheet_makes_no_caption_a_persons(options: LabelOptions) -> None:
    run(options)
    table = rows(options)
    with options.output.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
        writer.writerows([("filename", "prompt"), *((name, f"{text} ") for name, text in table.items())])
    assert run(options, overwrite=True).num_human == 0
    assert options.output.read_bytes().startswith(b"\xef\xbb\xbf")


def test_words_of_a_person_who_edits_during_the_run_are_kept(
    options: LabelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_scripts.captioners.sheet.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("lora_scripts.captioners.sheet.SAVE_SHARE", 1e9)
    run(options)
    write, calls = Blip.write, []

    def edited_meanwhile(self: Blip, *args) -> object:
        calls.append(1)
        if len(calls) == 2:  # after the first batch was saved: one row that was done, one that is still to come
            edit(options, img0="edited after it was done", img5="edited before its turn")
        return write(self, *args)

    monkeypatch.setattr(Blip, "write", edited_meanwhile)
    listener = Notes()
    label(replace(options, overwrite=True, batch_size=2), listener)
    after = rows(options)
    assert after["img0.png"] == "edited after it was done"
    assert after["img5.png"] == "edited before its turn"
    assert any("was edited during the run" in text for text in listener.texts)


def test_sidecars_count_as_captions_and_are_taken_over(options: LabelOptions) -> None:
    (options.folder / "img2.txt").write_text("from a text file", "utf-8")
    result = run(options)
    assert (result.num_written, result.num_kept) == (5, 1)
    assert rows(options)["img2.png"] == "from a text file"


def test_a_jsonl_table_is_taken_over_into_the_csv_beside_it(options: LabelOptions) -> None:
    (options.folder / "metadata.jsonl").write_text('{"file_name": "img1.png", "text": "from jsonl"}\n', "utf-8")
    assert run(options).num_kept == 1
    assert rows(options)["img1.png"] == "from jsonl"


def test_a_table_of_another_name_is_a_fresh_start(options: LabelOptions, models: Path) -> None:
    run(options)
    other = replace(options, output=options.folder / "other.csv", model=str(models / "other"))
    assert label(other, Notes()).num_written == 6
    assert rows(other) != rows(options)
    assert run(options).num_kept == 6


def test_names_of_kohya_folders_do_not_count_as_captions(options: LabelOptions) -> None:
    draw(options.folder / "10_red cat" / "a.png", 9)
    assert run(options).num_written == 7
    assert rows(options)["10_red cat/a.png"] != "red cat"


def test_rows_and_columns_of_others_stay(options: LabelOptions) -> None:
    options.output.write_text("image,rating,caption\nimg0.png,5,by hand\ngone.png,3,of a lost picture\n", "utf-8")
    run(options)
    with options.output.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["filename", "prompt", "rating"]
    assert table[1] == ["img0.png", "by hand", "5"]
    assert table[-1] == ["gone.png", "of a lost picture", "3"]
    assert len(table) == 8


@pytest.mark.fault(19)
def test_row_19_a_gbk_table_is_kept_as_it_was_beside_the_new_one(options: LabelOptions) -> None:
    data = "filename,prompt\nimg0.png,一只猫，坐着\n".encode("gbk")
    options.output.write_bytes(data)
    run(options)
    assert rows(options)["img0.png"] == "一只猫，坐着"
    assert options.output.with_name("metadata.csv.bak").read_bytes() == data


def test_copies_are_captioned_once(options: LabelOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("copy1.png", "sub/copy2.png"):
        (options.folder / name).parent.mkdir(exist_ok=True)
        (options.folder / name).write_bytes((options.folder / "img3.png").read_bytes())
    seen = []
    write = Blip.write
    monkeypatch.setattr(
        Blip, "write", lambda self, prepared, *rest: seen.extend(prepared) or write(self, prepared, *rest)
    )
    result = run(options)
    assert len(seen) == 6
    assert (result.num_written, result.num_copies) == (8, 2)
    assert rows(options)["copy1.png"] == rows(options)["sub/copy2.png"] == rows(options)["img3.png"]


def test_excluded_pictures_are_left_alone(options: LabelOptions) -> None:
    draw(options.folder / "sub" / "x.png", 50)
    result = run(options, exclude=("img[0-3].png", "x.png"))
    assert (result.num_pictures, result.num_written) == (2, 2)


def test_rules_can_be_changed_without_the_model(options: LabelOptions) -> None:
    run(options, rules=Rules(trigger="one"))
    edit(options, img1="mine")
    changes = reapply_rules(replace(options, rules=Rules(trigger="two"), model="no/model"), Notes(), dry_run=True)
    assert len(changes) == 5
    assert all(before.startswith("one, ") and after == f"two, {before[5:]}" for _, before, after in changes)
    assert rows(options)["img0.png"].startswith("one, ")
    reapply_rules(replace(options, rules=Rules(trigger="two"), model="no/model"), Notes())
    after = rows(options)
    assert after.pop("img1.png") == "mine"
    assert all(text.startswith("two, ") for text in after.values())
    assert run(options, overwrite=True).num_human == 1


def test_a_preview_writes_nothing(options: LabelOptions) -> None:
    (options.folder / "aa.png").touch()
    files = sorted(os.listdir(options.folder))
    waiting, shown = preview(replace(options, rules=Rules(trigger="mystyle")), Notes(), count=3)
    assert waiting == 7
    assert [name for name, _, _ in shown] == ["img0.png", "img1.png", "img2.png"]
    assert all(prompt.startswith("mystyle, ") for _, _, prompt in shown)
    assert sorted(os.listdir(options.folder)) == files


def test_review_starts_with_the_most_doubtful_and_skips_what_a_person_wrote(options: LabelOptions) -> None:
    run(options)
    first = doubtful(options, Notes(), 10)
    assert [record.doubt for record, _ in first] == sorted((record.doubt for record, _ in first), reverse=True)
    assert len(first) == 6
    edit(options, **{first[0][0].filename.removesuffix(".png"): "looked at"})
    assert [record.filename for record, _ in doubtful(options, Notes(), 2)] == [
        record.filename for record, _ in first[1:3]
    ]


@pytest.mark.fault(8)
def test_a_replaced_picture_is_noticed(options: LabelOptions) -> None:
    run(options)
    Image.new("RGB", (300, 300)).save(options.folder / "img2.png")
    listener = Notes()
    label(options, listener)
    assert any(text.startswith("Replaced since their captions were written: img2.png.") for text in listener.texts)


def test_spreadsheet_safe_tables_are_read_back_as_the_machines_own(options: LabelOptions) -> None:
    run(options, rules=Rules(trigger="=trigger"), spreadsheet_safe=True)
    assert b"'=trigger" in options.output.read_bytes()
    assert run(options, overwrite=True, spreadsheet_safe=True).num_human == 0
