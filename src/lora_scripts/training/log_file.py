"""The run's log as text, and the file that all of a run's logs are built on: appended to in whole entries or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts import __version__
from lora_scripts.errors import TrainingError
from lora_scripts.training.events import Answers, Level, Listener, Preview, RunStart, StepReport
from lora_scripts.words import PICTURES, Words, words_of

if TYPE_CHECKING:
    from io import FileIO

__all__ = ["AppendFile", "LogFile", "duration", "in_gib", "one_line", "shortened", "speed", "step_line", "use_of_time"]

_ROOM_MB = 1
"""What a log asks for when the disk is full: much more than an entry, so that the next try does not fail a step later."""
_MOST_OF_AN_ANSWER = 300
"""Characters; whole answers lie in the folder of samples."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class AppendFile:
    """A file that grows by whole entries: an entry that does not fit on the disk leaves no part of itself behind.

    Every entry is handed to the system at once, so a killed process loses none. The first failure is raised; after it
    the file stays silent, so that telling the user about the failure does not fail again.
    """

    def __init__(self, path: Path, mend: bytes = b"") -> None:
        """Opens `path` for appending and makes missing folders.

        Args:
            mend: written first when an older part of the file does not end with it, as after a power cut.
        Raises:
            TrainingError: the place cannot be written, or is a symbolic link.
        """
        self.path = path
        self._file: FileIO | None = None
        if path.is_symlink():
            raise TrainingError(
                f"{path}: is a symbolic link, which is never written through. Remove it, or choose another output_dir."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            unfinished = bool(mend) and not _ends_with(path, mend)
        except OSError as error:
            raise self._failed(error) from error
        if unfinished:
            self.write(mend)

    def write(self, data: bytes) -> None:
        """Append `data`, all of it or nothing.

        Raises:
            TrainingError: the disk is full or the file cannot be written any more.
        """
        if self._file is None:
            return
        start = 0
        try:
            start = os.fstat(self._file.fileno()).st_size
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise self._failed(error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _failed(self, error: OSError) -> TrainingError:
        with contextlib.suppress(OSError):
            self.close()
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG):
            return TrainingError(
                f"{self.path}: no room left on the disk; the logs need about {_ROOM_MB} MB at {self.path.parent}. "
                "What was written before is unharmed. Free some space and run the same command again: it goes on from "
                "the newest checkpoint."
            )
        return TrainingError(
            f"{self.path}: cannot be written ({error.strerror or error}). Check that the folder is there and may be "
            "written, then run the same command again."
        )


def _ends_with(path: Path, ending: bytes) -> bool:
    """Whether the file is empty or ends with `ending`."""
    size = path.stat().st_size
    if size == 0:
        return True
    with path.open("rb") as file:
        file.seek(max(0, size - len(ending)))
        return file.read() == ending


class LogFile(Listener):
    """Writes `train.log`: UTF-8, one line per event with date, time and level; a resumed run goes on in the same file."""

    def __init__(self, path: Path, now: Callable[[], datetime] = datetime.now) -> None:
        self._now = now
        self._words = PICTURES
        self._base_written = False
        self._file = AppendFile(path, mend=b"\n")
        self._write(f"lora-scripts {__version__}, Python {platform.python_version()}, {sys.platform}")

    def note(self, text: str, level: Level = "info") -> None:
        self._write(text, level)

    def progress(self, what: str, done: int, total: int) -> None:
        # The steps in between are for the terminal; a log of 10,000 pictures should not be 10,000 lines long.
        if done >= total:
            self._write(f"{what}: {done} of {total} done")

    def started(self, run: RunStart) -> None:
        self._words = words_of(str(run.settings.get("task_type")), str(run.settings.get("objective", "sft")))
        if run.first_step:
            self._write(f"resumed after step {run.first_step} of {run.max_steps}")
        else:
            self._write(f"started: {run.max_steps} steps")
        for what, value in run.facts:
            self._write(f"  {what}: {one_line(value)}")
        self._write("  settings: " + json.dumps(dict(run.settings), ensure_ascii=False, default=str))

    def stepped(self, report: StepReport) -> None:
        self._write(step_line(report, self._words))

    def previewed(self, preview: Preview) -> None:
        self._write(f"step {preview.step}: {len(preview.images)} previews rendered")

    def answered(self, answers: Answers) -> None:
        self._write(f"step {answers.step}: {len(answers.prompts)} prompts answered")
        for prompt, base, adapter in zip(answers.prompts, answers.base, answers.adapter, strict=True):
            said = [("asked", prompt), *([] if self._base_written else [("base", base.text)]), ("LoRA", adapter.text)]
            self._write("\n".join(f"  {who:<5}  {shortened(text, _MOST_OF_AN_ANSWER)}" for who, text in said))
        self._base_written = True  # it never changes
        for line in answers.alarms:
            self._write(line, "warning")

    def saved(self, step: int, folder: Path) -> None:
        self._write(f"step {step}: checkpoint saved in {folder}")

    def finished(self, files: Sequence[Path]) -> None:
        self._write("finished; written, read back and compared: " + ", ".join(str(file) for file in files))

    def close(self) -> None:
        self._file.close()

    def _write(self, text: str, level: Level = "info") -> None:
        prefix = f"{self._now():%Y-%m-%d %H:%M:%S} {level.upper():<7} "
        lines = [prefix + _CONTROL.sub(" ", line) for line in text.splitlines() if line.strip()]
        # File names that are not valid UTF-8 reach us as lone surrogates.
        self._file.write("".join(line + "\n" for line in lines).encode("utf-8", errors="backslashreplace"))


def speed(rate: float, words: Words) -> str:
    """`12.50 img/s`, `3,150 tok/s`."""
    return f"{rate:,.0f} {words.short_unit}/s" if rate >= 100 else f"{rate:.2f} {words.short_unit}/s"


def use_of_time(report: StepReport) -> list[str]:
    """`padding 3%`, `waiting 1%`, `38% of peak`, as far as they are known."""
    found = report.throughput
    if found is None:
        return []
    parts = [("{:.0%} of peak", found.peak_share), ("padding {:.0%}", found.padding), ("waiting {:.0%}", found.waiting)]
    return [text.format(share) for text, share in parts if share is not None]


def step_line(report: StepReport, words: Words = PICTURES) -> str:
    """The numbers of a report on one line, without colour, as train.log and terminals that are files show them."""
    width = len(str(report.max_steps))
    rates = "  ".join(
        f"lr {rate:.2e}" if len(report.learning_rates) == 1 else f"lr/{group} {rate:.2e}"
        for group, rate in report.learning_rates.items()
    )
    percent = f"{report.step / max(report.max_steps, 1):.0%}"
    return (
        f"step {report.step:>{width}}/{report.max_steps}  {percent:>4}  epoch {report.epoch:.2f}"
        f"  loss {report.loss:.4f}  smoothed {report.loss_smoothed:.4f}  {rates}  grad norm {report.grad_norm:.3f}"
        f"  {'  '.join([speed(report.rate, words), *use_of_time(report)])}  memory {in_gib(report.memory.current_bytes)}"
        f" (peak {in_gib(report.memory.peak_bytes)})  {duration(report.eta_s)} left"
    )


def shortened(text: str, most: int) -> str:
    """The text on one line, cut to `most` characters."""
    line = one_line(text)
    return line if len(line) <= most else line[: most - 3] + "..."


def one_line(text: str) -> str:
    """The text without line breaks and control characters, which could otherwise steer a terminal."""
    return _CONTROL.sub(" ", " ".join(text.split()))


def in_gib(num_bytes: int) -> str:
    """`2.1 GiB`; small amounts get a second digit."""
    gib = num_bytes / 2**30
    return f"{gib:.2f} GiB" if gib < 1 else f"{gib:.1f} GiB"


def duration(seconds: float) -> str:
    """`0:03:12`, or `-:--:--` when it is not known."""
    if not 0 <= seconds < 1e8:
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
