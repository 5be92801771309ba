"""The record of a run, whole, cut off and resumed, and the sample pictures beside it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from PIL import Image

from helpers.told import answers, preview, report, short_run, start
from lora_scripts.dialogues.answers import Answer
from lora_scripts.training.events import Events
from lora_scripts.training.record import RunRecord, SampleFiles, read_record


def test_record_reads_back_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = RunRecord(path)
    record.note("24 of 25 pictures train")
    short_run(record, 0, 20)
    history = read_record(path)
    assert history.settings["description"] == "水墨"
    assert history.facts == [("base model", "builtin:mini-sd"), ("图片", "24")]
    assert (history.captions, history.num_captions) == ([("a.png", "a cat, ink | wash"), ("猫.png", "一只猫")], 2)
    assert history.steps == list(range(1, 21))
    assert history.losses == [0.5 + i % 10 / 100 for i in range(20)]
    assert history.reports == [report(10), report(20)]
    assert history.previews[10].prompts == ["a cat", "一只<猫>"]
    assert history.previews[10].files == [tmp_path / "samples" / f"step-000010-{i}.png" for i in (1, 2)]
    assert history.checkpoints == [(10, "checkpoint-10"), (20, "checkpoint-20")]
    assert [(note.step, note.text) for note in history.notes] == [(None, "24 of 25 pictures train")]
    assert (history.max_steps, history.last_step, history.num_parts, history.finished) == (40, 20, 1, False)
    assert history.started_at


def test_record_reads_back_answers_and_forgets_those_of_superseded_steps(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    for first_step in (0, 10):
        record = RunRecord(path)
        record.started(start(first_step))
        for step in (first_step, first_step + 10, first_step + 20):
            record.answered(answers(step, f"alarm of the start at {first_step}"))
        record.close()
    told = read_record(path).answers
    assert list(told) == [0, 10, 20, 30]
    assert told[20].adapter[0].text == "It arrives\ntoday, dear (20)."
    assert told[20].base[1] == Answer("| # | *not* a table", False, 160)
    assert [told[step].alarms for step in told] == [["alarm of the start at 0"], *([["alarm of the start at 10"]] * 3)]
    assert told[0].prompts == ["Where is it?", "包裹<在哪>？"]
    assert told[0].expected == ["Today, dear.", ""]


def test_record_of_an_older_version_has_its_speed_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = RunRecord(path)
    record.started(start())
    record.stepped(report(10))
    record.close()
    path.write_text(path.read_text("utf-8").replace('"rate":', '"examples_per_s":'), "utf-8")
    assert [each.rate for each in read_record(path).reports] == [12.5]


def test_record_ignores_a_line_that_a_kill_cut_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    short_run(RunRecord(path), 0, 10)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole) - 1):
        path.write_bytes(whole[:cut])
        history = read_record(path)
        assert (history.steps, sorted(history.previews)) == (list(range(1, 11)), [0]), cut
    path.write_bytes(whole[: last + 20])
    short_run(RunRecord(path), 10, 20)
    history = read_record(path)
    assert (history.steps, history.num_parts) == (list(range(1, 21)), 2)


def test_record_survives_the_zeros_a_power_cut_leaves(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    short_run(RunRecord(path), 0, 10)
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    short_run(RunRecord(path), 10, 20)
    history = read_record(path)
    assert (history.last_step, history.num_parts) == (20, 2)


def test_record_of_a_resumed_run_leaves_out_what_was_superseded(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = RunRecord(path)
    record.note("loading")
    record.started(start())
    for step in range(1, 36):
        record.ticked(step)
        if step % 10 == 0:
            record.stepped(report(step, loss=0.9))
            record.saved(step, Path(f"out/checkpoint-{step}"))
            record.previewed(preview(step))
        if step in (15, 25):
            record.note(f"noted at {step}", "warning")
    record.close()
    record = RunRecord(path)
    record.note("loading")
    record.note("going on after step 20")
    short_run(record, 20, 40, loss=0.1)

    history = read_record(path)
    assert history.steps == list(range(1, 41))
    assert history.losses[19] == pytest.approx(0.99)
    assert history.losses[20] == pytest.approx(0.1)
    assert [(each.step, each.loss_smoothed) for each in history.reports] == [(10, 0.9), (20, 0.9), (30, 0.1), (40, 0.1)]
    assert [step for step, _ in history.checkpoints] == [10, 20, 30, 40]
    assert list(history.previews) == [10, 20, 30, 40]
    assert [note.text for note in history.notes] == ["loading", "going on after step 20", "noted at 15"]
    assert history.num_parts == 2


def test_record_resumed_inside_a_report_keeps_its_first_losses(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    short_run(RunRecord(path), 0, 30, loss=0.9)
    record = RunRecord(path)
    record.started(start(25))
    record.stepped(report(30, num_steps=5, loss=0.1))
    record.close()
    history = read_record(path)
    assert history.steps == list(range(1, 31))
    assert history.losses[24] == pytest.approx(0.94)
    assert history.losses[25] == pytest.approx(0.1)


def test_record_of_a_finished_run_started_again_counts_no_new_part(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    short_run(RunRecord(path), 0, 40)
    short_run(RunRecord(path), 40, 40)
    assert (read_record(path).last_step, read_record(path).num_parts) == (40, 1)


def test_record_of_a_run_begun_anew_forgets_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    short_run(RunRecord(path), 0, 30)
    short_run(RunRecord(path), 0, 10)
    history = read_record(path)
    assert (history.last_step, history.num_parts, list(history.previews)) == (10, 1, [0, 10])


def test_record_of_a_refused_start_says_nothing_about_the_run_that_came_later(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    refused = RunRecord(path)
    refused.note("refused", "warning")
    refused.close()
    assert [note.text for note in read_record(path).notes] == ["refused"]
    record = RunRecord(path)
    record.note("said at the start")
    short_run(record, 0, 10)
    told = [note.text for note in read_record(path).notes]
    assert "said at the start" in told
    assert "refused" not in told


def test_record_counts_the_time_of_kept_steps_over_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    path = tmp_path / "record.jsonl"
    record = RunRecord(path)
    record.started(start())
    for step, now in ((10, 130.0), (20, 150.0)):
        clock[0] = now
        record.stepped(report(step))
    record.close()
    clock[0] = 7.0  # another boot
    record = RunRecord(path)
    record.started(start(10))
    clock[0] = 12.0
    record.stepped(report(20))
    record.close()
    assert read_record(path).seconds == pytest.approx(30 + 5)


def test_record_holds_numbers_that_are_not_finite_and_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = RunRecord(path)
    record.started(start())
    record.stepped(report(2, losses=[0.5, math.nan], grad_norm=math.inf))
    record.note("\udcff.png is left out")
    record.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
    history = read_record(path)
    assert history.losses[0] == 0.5
    assert math.isnan(history.losses[1])
    assert history.notes[0].text == "\udcff.png is left out"


def test_record_that_does_not_exist_is_an_empty_history(tmp_path: Path) -> None:
    history = read_record(tmp_path / "record.jsonl")
    assert (history.steps, history.last_step, history.finished) == ([], 0, False)


def test_record_names_the_finished_files(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "record.jsonl")
    record.started(start())
    record.finished([Path("out/my.safetensors")])
    record.close()
    history = read_record(tmp_path / "record.jsonl")
    assert (history.finished, history.files) == (True, [Path("out/my.safetensors")])


def test_sample_files_lie_where_the_record_says_with_their_prompt_inside(tmp_path: Path) -> None:
    from lora_scripts.sampling.infotext import read_infotext

    events = Events([SampleFiles(tmp_path / "samples"), RunRecord(tmp_path / "record.jsonl")])
    events.started(start())
    events.previewed(preview(100, "blue"))
    events.close()
    files = read_record(tmp_path / "record.jsonl").previews[100].files
    assert [file.name for file in files] == ["step-000100-1.png", "step-000100-2.png"]
    with Image.open(files[1]) as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((16, 8), (0, 0, 255))
    text = read_infotext(files[1])
    assert text is not None
    assert text.prompt == "一只<猫>"
    assert (text.settings["Seed"], text.settings["Size"], text.settings["CFG scale"]) == ("8", "16x8", "7.0")
