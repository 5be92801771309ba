from __future__ import annotations

import io
import json

import pytest

from lora_scripts.errors import DataError
from lora_scripts.preflight.findings import Finding, Prediction, Report
from lora_scripts.preflight.terminal import report_lines, report_notes, show_report

RED = Finding("red", "unreadable", "3 of 9 pictures cannot be read.", ["a.png", "b.png", "c.png"], "Copy them again.")
AMBER = Finding("amber", "blurred", "1 picture is blurred.", ["d.png"], "Replace it.", {"d.png": "very"})
MORE_AMBER = Finding("amber", "dark", "2 pictures are dark.", ["e.png", "f.png"], "Brighten them.")
NOTE = Finding("note", "steps", "60 steps.")
REPORT = Report([NOTE, AMBER, RED, MORE_AMBER], 6, 9, Prediction(60, 1000, 2000))


def test_worst_comes_first_and_what_concerns_most_pictures() -> None:
    assert [finding.code for finding in REPORT.worst_first] == ["unreadable", "dark", "blurred", "steps"]


def test_red_blocks_unless_forced() -> None:
    assert (REPORT.exit_code(), REPORT.exit_code(force=True)) == (2, 0)
    with pytest.raises(
        DataError, match=r"3 of 9 pictures cannot be read. Copy them again.\nThe run was not started. --force"
    ):
        REPORT.require_good()
    REPORT.require_good(force=True)


def test_refusal_tells_the_reason_of_every_picture() -> None:
    details = {f"{i}.png": f"reason {i}" for i in range(3)}
    with pytest.raises(DataError, match=r"Bad\.\n  0\.png: reason 0\n  1\.png: reason 1\n  2\.png: reason 2\n"):
        Report([Finding("red", "unreadable", "Bad.", list(details), "", details)], 0, 3).require_good()


def test_amber_and_notes_do_not_block() -> None:
    report = Report([AMBER, NOTE], 8, 8)
    assert report.exit_code() == 0
    report.require_good()


def test_json_holds_all_that_is_documented() -> None:
    written = json.loads(json.dumps(REPORT.to_json()))
    assert written["format"] == 1
    assert written["verdict"] == "blocked"
    assert written["pictures"] == {"total": 9, "trained": 6}
    assert written["counts"] == {"red": 1, "amber": 2, "note": 1}
    assert written["findings"][2] == {
        "level": "amber",
        "code": "blurred",
        "text": "1 picture is blurred.",
        "names": ["d.png"],
        "details": {"d.png": "very"},
        "remedy": "Replace it.",
    }
    assert set(written["prediction"]) == {
        "steps", "disk_bytes", "free_bytes", "step_seconds", "total_seconds", "peak_bytes", "device_bytes",
    }  # fmt: skip
    assert Report([AMBER], 1, 1).to_json()["verdict"] == "attention"
    assert Report([NOTE], 1, 1).to_json()["verdict"] == "good"
    assert Report([], 1, 1).to_json()["prediction"] is None


def test_plain_text_outside_a_terminal() -> None:
    stream = io.StringIO()
    show_report(REPORT, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "6 of 9 pictures can be trained on."
    assert lines[2] == "RED    3 of 9 pictures cannot be read."
    assert lines[3].strip() == "a.png, b.png, c.png"
    assert lines[-1] == "Blocked by 1 red finding. --force goes on all the same."
    assert "\x1b" not in stream.getvalue()
    assert any("d.png (very)" in line for line in lines)


def test_report_fits_one_screen_and_never_hides_what_is_red() -> None:
    many = [Finding("red", f"r{i}", f"Red {i}.") for i in range(12)]
    many += [Finding("amber", f"a{i}", "Amber. " * 30, [f"{n}.png" for n in range(900)], "Do it.") for i in range(12)]
    lines = [text for _, text in report_lines(Report(many, 900, 900), width=80, height=24)]
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert sum("Red" in line for line in lines) == 12
    assert any("... and 11 more findings; --json lists everything." in line for line in lines)


def test_a_runs_log_gets_one_line_per_finding_and_the_prediction() -> None:
    told = report_notes(Report([*REPORT.findings, Finding("note", "prediction", "Predicted: 3 min.")], 6, 9))
    assert told[0] == ("3 of 9 pictures cannot be read. Copy them again.", True)  # the run names them as left out
    assert told[2] == ("1 picture is blurred. Pictures: d.png (very). Replace it.", True)
    assert told[3:] == [("Predicted: 3 min.", False)]


def test_what_is_red_can_be_left_to_the_refusal() -> None:
    assert report_notes(REPORT, with_red=False) == report_notes(REPORT)[1:]
