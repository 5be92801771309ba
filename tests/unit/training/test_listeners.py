"""Every listener's effect, read back from what it wrote."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_scripts.errors import TrainingError
from lora_scripts.training.console import ConsoleListener
from lora_scripts.training.events import Events, Listener, Preview, RunStart, StepReport, Validation
from lora_scripts.training.log_file import AppendFile, LogFile, duration
from lora_scripts.training.memory import MemoryReading
from lora_scripts.training.record import RunRecord, SampleFiles, read_record
from lora_scripts.training.tensorboard import TensorBoardListener

SRC = Path(__file__).parents[3] / "src"


def start(first_step: int = 0, max_steps: int = 40, **changes: Any) -> RunStart:
    values: dict[str, Any] = {
        "settings": {"lora_rank": 8, "learning_rate": 2e-4, "sample_seed": 7, "description": "水墨"},
        "facts": [("base model", "builtin:mini-sd"), ("图片", "24")],
        "captions": [("a.png", "a cat, ink | wash"), ("猫.png", "一只猫")],
    }
    return RunStart(**(values | changes), first_step=first_step, max_steps=max_steps)


def report(step: int, num_steps: int = 10, loss: float = 0.5, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "max_steps": 40,
        "epoch": step / 4,
        "losses": [loss + i / 100 for i in range(num_steps)],
        "loss_smoothed": loss,
        "learning_rates": {"unet": 1e-4, "text_encoder": 5e-5},
        "grad_norm": 0.75,
        "examples_per_s": 12.5,
        "eta_s": 61.0,
        "memory": MemoryReading(2**30, 3 * 2**30, "process"),
    }
    return StepReport(step=step, **(values | changes))


def preview(step: int, colour: str = "red", prompts: tuple[str, ...] = ("a cat", "一只<猫>")) -> Preview:
    return Preview(step, prompts, [Image.new("RGB", (16, 8), colour) for _ in prompts])


def short_run(listener: Listener, first_step: int, last_step: int, loss: float = 0.5) -> None:
    """Starts, reports and saves every 10 steps, and closes without being finished."""
    listener.started(start(first_step))
    if first_step == 0:
        listener.previewed(preview(0))
    for step in range(first_step + 1, last_step + 1):
        listener.ticked(step)
        if step % 10 == 0:
            listener.stepped(report(step, loss=loss))
            listener.saved(step, Path(f"out/checkpoint-{step}"))
            listener.previewed(preview(step))
    listener.close()


# TensorBoard


def accumulate(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def test_tensorboard_reads_back_every_number_picture_and_text(tmp_path: Path) -> None:
    listener = TensorBoardListener(tmp_path)
    listener.started(start())
    listener.previewed(preview(0, "red"))
    listener.stepped(report(10))
    listener.close()

    events = accumulate(tmp_path)
    losses = events.Scalars("loss/train")
    assert [point.step for point in losses] == list(range(1, 11))
    assert [point.value for point in losses] == pytest.approx([0.5 + i / 100 for i in range(10)])
    expected = {
        "loss/smoothed": 0.5,
        "lr/unet": 1e-4,
        "lr/text_encoder": 5e-5,
        "grad_norm": 0.75,
        "speed/images_per_s": 12.5,
        "memory/current_gib": 1.0,
        "memory/peak_gib": 3.0,
    }
    for tag, value in expected.items():
        assert [(point.step, point.value) for point in events.Scalars(tag)] == [(10, pytest.approx(value))], tag

    shown = events.Images("preview/1")
    picture = Image.open(io.BytesIO(shown[0].encoded_image_string))
    assert (shown[0].step, picture.size, picture.getpixel((3, 3))) == (0, (16, 8), (255, 0, 0))

    def text(tag: str) -> str:
        (event,) = events.Tensors(f"{tag}/text_summary")
        words: bytes = event.tensor_proto.string_val[0]
        return words.decode("utf-8")

    assert text("config").splitlines() == [
        "```yaml",
        "lora_rank: 8",
        "learning_rate: 0.0002",
        "sample_seed: 7",
        "description: 水墨",
        "```",
    ]
    assert "base model | builtin:mini-sd" in text("run")
    assert "2 | 猫.png | 一只猫" in text("captions")
    assert "a cat, ink &#124; wash" in text("captions")
    assert text("preview/2") == "一只&#60;猫&#62;"


def test_tensorboard_shows_both_validation_losses_and_their_gap_in_one_chart(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    listener = TensorBoardListener(tmp_path)
    listener.started(start())
    listener.validated(Validation(0, [0.5, 0.7], [0.4, 0.4]))
    listener.close()

    events = accumulate(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    (chart,) = [chart for chart in layout.category[0].chart if chart.title.startswith("memorisation")]
    shown = {tag: events.Scalars(tag)[0].value for tag in chart.multiline.tag}
    assert shown == {
        "validation/held_out": pytest.approx(0.6),
        "validation/training": pytest.approx(0.4),
        "validation/gap": pytest.approx(0.2),
    }


def test_tensorboard_caption_table_stops_at_100(tmp_path: Path) -> None:
    listener = TensorBoardListener(tmp_path)
    listener.started(start(captions=[(f"{i}.png", "a cat") for i in range(130)]))
    listener.close()
    (event,) = accumulate(tmp_path).Tensors("captions/text_summary")
    words = event.tensor_proto.string_val[0].decode()
    assert "100 | 99.png" in words
    assert "100.png" not in words
    assert words.endswith("30 more are not shown.")


def test_tensorboard_curves_of_a_resumed_run_join(tmp_path: Path) -> None:
    short_run(TensorBoardListener(tmp_path), 0, 30, loss=0.9)
    short_run(TensorBoardListener(tmp_path), 20, 40, loss=0.1)
    events = accumulate(tmp_path)
    losses = {point.step: point.value for point in events.Scalars("loss/train")}
    assert sorted(losses) == list(range(1, 41))
    assert losses[20] == pytest.approx(0.99)
    assert losses[21] == pytest.approx(0.1)
    assert [point.step for point in events.Scalars("loss/train")] == list(range(1, 41))
    assert [image.step for image in events.Images("preview/1")] == [0, 10, 20, 30, 40]


def test_tensorboard_part_started_with_the_clock_set_back_still_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_run(TensorBoardListener(tmp_path), 0, 30, loss=0.9)
    earlier = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: earlier)
    short_run(TensorBoardListener(tmp_path), 20, 30, loss=0.1)
    assert [round(point.value, 2) for point in accumulate(tmp_path).Scalars("loss/smoothed")] == [0.9, 0.9, 0.1]


def test_tensorboard_numbers_are_on_the_disk_before_the_run_ends(tmp_path: Path) -> None:
    listener = TensorBoardListener(tmp_path)
    listener.started(start())
    listener.stepped(report(10))
    assert len(accumulate(tmp_path).Scalars("loss/train")) == 10
    listener.close()


# train.log


def test_log_lines_carry_time_and_level_and_are_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "new" / "train.log"
    for first_step in (0, 10):
        log = LogFile(path, now=lambda: datetime(2026, 1, 2, 3, 4, 5))
        log.note("坏图.png: cannot be decoded\nsecond line", "warning")
        log.started(start(first_step))
        log.stepped(report(first_step + 10))
        log.previewed(preview(first_step + 10))
        log.saved(first_step + 10, Path("out/checkpoint-10"))
        log.finished([Path("out/x.safetensors")])
        log.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"2026-01-02 03:04:05 (INFO   |WARNING) {1,3}\S", line) for line in lines)
    assert lines[1:3] == [
        "2026-01-02 03:04:05 WARNING 坏图.png: cannot be decoded",
        "2026-01-02 03:04:05 WARNING second line",
    ]
    text = "\n".join(lines)
    assert "started: 40 steps" in text
    assert "resumed after step 10 of 40" in text
    assert "step 10/40   25%  epoch 2.50  loss 0.5450  smoothed 0.5000  lr/unet 1.00e-04" in text
    assert "memory 1.0 GiB (peak 3.0 GiB)  0:01:01 left" in text
    assert '"description": "水墨"' in text
    assert "step 20: checkpoint saved in out" in text
    assert "read back and compared: out" in text


def test_log_keeps_control_characters_and_undecodable_names_out(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "train.log")
    log.note("\x1b[31mred\x07 \udcff.png")
    log.close()
    text = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert " [31mred  \\udcff.png\n" in text


def test_log_goes_on_in_a_new_line_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_bytes(b"half a li")
    LogFile(path).close()
    assert path.read_text().splitlines()[0] == "half a li"


def test_log_in_an_impossible_place_is_a_training_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"train\.log: cannot be written"):
        LogFile(tmp_path / "file" / "train.log")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_full_disk_ends_in_one_training_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: both cut a write in the middle."""
    code = f"""
import resource
from pathlib import Path
from lora_scripts.errors import TrainingError
from lora_scripts.training.log_file import LogFile
from lora_scripts.training.record import RunRecord
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for listener in (LogFile(Path({str(tmp_path)!r}) / "train.log"), RunRecord(Path({str(tmp_path)!r}) / "record.jsonl")):
    errors = 0
    for i in range(100):
        try:
            listener.note(f"line {{i}} of a run that logs much")
        except TrainingError as error:
            errors += 1
            print(error)
    listener.close()
    assert errors == 1, errors
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("no room left on the disk; the logs need about 1 MB at") == 2
    log, record = ((tmp_path / name).read_bytes() for name in ("train.log", "record.jsonl"))
    assert 900 < len(log) <= 1000
    assert log.endswith(b"logs much\n")
    events = [json.loads(line)["event"] for line in record.splitlines()]
    assert events == ["opened"] + ["note"] * (record.count(b"\n") - 1)


def test_append_file_writes_nothing_after_it_was_closed(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "x")
    file.write(b"one\n")
    file.close()
    file.write(b"two\n")
    file.close()
    assert (tmp_path / "x").read_bytes() == b"one\n"


def test_duration_is_written_like_a_clock() -> None:
    assert duration(3725.4) == "1:02:05"
    assert duration(math.inf) == duration(math.nan) == duration(-1) == "-:--:--"


# The record


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


# The terminal


def test_console_in_a_file_writes_plain_aligned_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some CI services set it
    stream = io.StringIO()
    console = ConsoleListener(stream)
    console.note("[red]x[/red] " + "y" * 200)
    console.progress("encoding pictures", 1, 2)
    console.progress("encoding pictures", 2, 2)
    console.started(start())
    console.ticked(1)
    console.stepped(report(10))
    console.saved(10, Path("out/checkpoint-10"))
    console.close()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert lines[0] == "[red]x[/red] " + "y" * 200
    assert lines[1:5] == [
        "encoding pictures: 2 done",
        "base model  builtin:mini-sd",
        "图片        24",
        "step 10/40   25%  epoch 2.50  loss 0.5450  smoothed 0.5000  lr/unet 1.00e-04  lr/text_encoder 5.00e-05"
        "  grad norm 0.750  12.50 img/s  memory 1.0 GiB (peak 3.0 GiB)  0:01:01 left",
    ]
    assert lines[5] == "step 10: saved checkpoint-10"


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_console_replaces_what_the_encoding_lacks(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    console = ConsoleListener(stream)
    console.note("猫😀.png: cannot be decoded", "warning")
    console.started(start())
    console.close()
    text = raw.getvalue().decode(encoding)
    assert ("猫?.png" if encoding == "gbk" else "??.png") in text


TERMINAL_RUN = """
from pathlib import Path
import time
from lora_scripts.training.console import ConsoleListener
from lora_scripts.training.events import RunStart, StepReport
from lora_scripts.training.memory import MemoryReading
console = ConsoleListener()
console.started(RunStart({}, [("base model", "builtin:mini-sd")], [], 0, 40))
for step in range(1, 41):
    console.ticked(step)
    if step % 10 == 0:
        reading = MemoryReading(2**30, 2**30, "process")
        console.stepped(StepReport(step, 40, 1.0, [0.5], 0.125, {"unet": 1e-4}, 1.0, 12.5, 61.0, reading))
        time.sleep(0.3)
    if step == 20:
        console.note("a note in between")
console.finished([])
console.close()
print("done", console.live)
"""


def run_in_terminal(columns: int, **environment: str) -> str:
    """What the run above writes to a terminal of that width."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment = {**clean, "PYTHONPATH": str(SRC), "TERM": "xterm-256color", **environment}
    with subprocess.Popen(
        [sys.executable, "-c", TERMINAL_RUN], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux reports the closed other side so
                break
            if not part:
                break
            written += part
        os.close(ours)
        assert process.wait() == 0, written.decode()
    return written.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_console_on_a_terminal_shows_one_bar_with_notes_above_it() -> None:
    text = run_in_terminal(110)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "done True" in plain
    assert re.search(r"train .*10/40 loss 0\.1250  lr 1\.0e-04  12\.50 img/s  1\.0 GiB 0:0[01]:\d\d left", plain)
    assert "a note in between" in plain
    assert plain.index("a note in between") < plain.rindex("40/40")
    assert "\x1b[38" in text or "\x1b[32" in text
    assert "\x1b[?25h" in text  # the cursor is shown again


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_console_on_a_narrow_terminal_without_colour() -> None:
    text = run_in_terminal(60, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][;m]", text)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    bars = [line for line in re.split(r"[\r\n]+", plain) if "train" in line]
    assert bars
    assert all(len(line) <= 60 for line in bars)
    assert "loss 0.1250" in plain


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pipes")
def test_console_outlives_the_reader_of_its_pipe() -> None:
    code = (
        "import sys\nfrom lora_scripts.training.console import ConsoleListener\nconsole = ConsoleListener()\n"
        "for i in range(2000):\n    console.note('x' * 100)\nconsole.close()\nprint('survived', file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "survived\n"
        assert process.wait() == 0
