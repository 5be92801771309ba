"""What a person sees on a terminal, in a file and through a pipe."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.told import answers, report, start
from lora_scripts.training.console import ConsoleListener
from lora_scripts.training.events import Validation

SRC = Path(__file__).parents[3] / "src"


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


def test_console_shows_one_answer_of_a_step_and_every_alarm() -> None:
    stream = io.StringIO()
    console = ConsoleListener(stream)
    console.started(start(settings={"task_type": "text-generation"}))
    console.answered(answers(10, "2 of 2 answers do not end."))
    console.validated(Validation(10, [0.5], [0.25]))
    console.stepped(report(10, rate=3150.4))
    console.close()
    lines = stream.getvalue().splitlines()[2:]
    assert lines[:3] == [
        'step 10: "Where is it?" -> "It arrives today, dear (10)."',
        "warning: step 10: 2 of 2 answers do not end.",
        "step 10: validation loss 0.5000 on held-out dialogues, 0.2500 on training dialogues",
    ]
    assert "3,150 tok/s" in lines[3]


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
