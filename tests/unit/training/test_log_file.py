"""train.log, line by line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from helpers.told import answers, preview, report, start
from lora_scripts.errors import TrainingError
from lora_scripts.training.log_file import AppendFile, LogFile, duration

SRC = Path(__file__).parents[3] / "src"


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


def test_log_holds_questions_and_answers_and_the_base_models_once(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "train.log")
    log.started(start(settings={"task_type": "text-generation"}))
    log.answered(answers(10))
    log.answered(answers(20, "2 of 2 answers do not end."))
    log.stepped(report(20, rate=3150.4))
    log.close()
    lines = [line[20:] for line in (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()[-14:]]
    assert lines[:7] == [
        "INFO    step 10: 2 prompts answered",
        "INFO      asked  Where is it?",
        "INFO      base   No idea.",
        "INFO      LoRA   It arrives today, dear (10).",
        "INFO      asked  包裹<在哪>？",
        "INFO      base   | # | *not* a table",
        "INFO      LoRA   下午到。",
    ]
    assert lines[7:9] == ["INFO    step 20: 2 prompts answered", "INFO      asked  Where is it?"]
    assert lines[9] == "INFO      LoRA   It arrives today, dear (20)."
    assert lines[12] == "WARNING 2 of 2 answers do not end."
    assert "3,150 tok/s" in lines[13]


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
