"""`train`: the pipeline with everything that listens to it, stop signals, and the report at the end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.errors import DataError, LoraScriptsError
from lora_scripts.training.events import Events, Listener

if TYPE_CHECKING:
    from lora_scripts.pipeline import Outcome

__all__ = ["StopSignal", "train_and_report", "train_command"]

STOPPED = 130


class StopSignal:
    """Set by the first Ctrl-C or SIGTERM, so that a run saves and ends after its step; the second one interrupts."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def __call__(self) -> bool:
        return self._asked.is_set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Signal handlers in place; only the main thread may set them, elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, frame: FrameType | None) -> None:
            if self._asked.is_set():
                raise KeyboardInterrupt
            self._asked.set()

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_command(config: RunConfig, advice: Sequence[str] = ()) -> int:
    """Trains and reports; the exit code."""
    outcome = train_and_report(config, advice)
    if not outcome.complete:
        return STOPPED
    print(_next_steps(config, outcome.files[0]))
    return 0


def train_and_report(config: RunConfig, advice: Sequence[str] = (), more: Sequence[Listener] = ()) -> Outcome:
    """The pipeline with every listener at work, and the report at the end.

    Raises:
        LoraScriptsError: as `pipeline.run`; the run's log holds the message too.
    """
    from lora_scripts.pipeline import run
    from lora_scripts.report.build import build_report
    from lora_scripts.training.console import ConsoleListener
    from lora_scripts.training.log_file import LogFile
    from lora_scripts.training.record import RunRecord, SampleFiles
    from lora_scripts.training.tensorboard import TensorBoardListener

    output_dir = config.output_dir
    _require_writable(output_dir)
    console = ConsoleListener()
    files: list[Listener] = [
        LogFile(output_dir / "train.log"),
        TensorBoardListener(output_dir / "logs"),
        SampleFiles(output_dir / "samples"),
        RunRecord(output_dir / "record.jsonl"),
    ]
    events = Events([console, *files, *more])
    stop = StopSignal()
    try:
        for line in advice:
            events.note(line, "warning")
        with stop.installed():
            outcome = run(config, events, stop)
        if outcome.complete:
            events.note(f"Report: {build_report(config, outcome)}")
    except LoraScriptsError as error:
        for listener in files:  # the console gets it from the command's end
            listener.note(str(error), "warning")
        raise
    finally:
        events.close()
    return outcome


def _require_writable(folder: Path) -> None:
    """Raises DataError, before any weight is read, when the output folder cannot take files."""
    probe = folder / f".write-test-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"output_dir: {folder}: cannot be written ({error.strerror}). Choose another folder.") from None


def _next_steps(config: RunConfig, file: Path) -> str:
    trigger = f"{config.trigger_word}, " if config.trigger_word else ""
    return (
        f"Use it: copy {file.name} to models/Lora (WebUI) or models/loras (ComfyUI) and write {trigger}... <lora:{config.name}:0.8>\n"
        f'Try it: lora-scripts sample --base-model {config.base_model} --prompt "{trigger}... <lora:{config.name}:0.8>" '
        f"--lora-dir {config.output_dir} --output pictures"
    )
