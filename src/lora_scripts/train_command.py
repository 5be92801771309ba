"""`train`: the pipeline with everything that listens to it, stop signals, and the report at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.errors import DataError, LoraScriptsError
from lora_scripts.processes import ONE, Processes, joined_processes
from lora_scripts.run_lock import locked
from lora_scripts.stop_signal import StopSignal
from lora_scripts.training.events import Events, Listener

if TYPE_CHECKING:
    from lora_scripts.pipeline import Outcome

__all__ = ["train_and_report", "train_command"]

STOPPED = 130


def train_command(config: RunConfig, advice: Sequence[str] = (), force: bool = False) -> int:
    """Trains and reports; the exit code. Started by `torchrun`, this process does its part and the first one writes."""
    from lora_scripts.pipeline import run

    with joined_processes(config.device) as processes:
        if not processes.is_first:
            stop = StopSignal(num_processes=processes.count)
            with stop.installed():
                return 0 if run(config, Events([stop]), stop, force=force, processes=processes).complete else STOPPED
        outcome = train_and_report(config, advice, force=force, processes=processes)
    if not outcome.complete:
        return STOPPED
    print(NEXT_STEPS[config.task_type](config, outcome.files[0]))
    return 0


def train_and_report(
    config: RunConfig,
    advice: Sequence[str] = (),
    more: Sequence[Listener] = (),
    *,
    force: bool = False,
    processes: Processes = ONE,
) -> Outcome:
    """The pipeline with every listener at work, and the report at the end; `force` and `processes` as for `pipeline.run`.

    Raises:
        LoraScriptsError: as `pipeline.run`; the run's log holds the message too.
    """
    _require_writable(config.output_dir)
    with locked(config.output_dir):
        return _train_locked(config, advice, more, force, processes)


def _train_locked(
    config: RunConfig, advice: Sequence[str], more: Sequence[Listener], force: bool, processes: Processes
) -> Outcome:
    from lora_scripts.pipeline import run
    from lora_scripts.training.answer_files import AnswerFiles
    from lora_scripts.training.console import ConsoleListener
    from lora_scripts.training.log_file import LogFile
    from lora_scripts.training.record import RunRecord, SampleFiles
    from lora_scripts.training.tensorboard import TensorBoardListener

    output_dir = config.output_dir
    stop = StopSignal(num_processes=processes.count)
    console = ConsoleListener()
    files: list[Listener] = [
        LogFile(output_dir / "train.log"),
        TensorBoardListener(output_dir / "logs"),
        SampleFiles(output_dir / "samples"),
        AnswerFiles(output_dir / "samples"),
        RunRecord(output_dir / "record.jsonl"),
    ]
    # The stop signal hears of a step or a save before the others do: it must know what is unsaved at any moment.
    events = Events([stop, console, *files, *more])
    try:
        for line in advice:
            events.note(line, "warning")
        with stop.installed():
            outcome = run(config, events, stop, force=force, processes=processes)
        if outcome.complete:
            from lora_scripts.report.build import build_report

            events.note(f"Report: {build_report(config, outcome)}")
    except KeyboardInterrupt:
        _tell(files, "Interrupted. The newest checkpoint is whole; the same command goes on from there.")
        raise
    except LoraScriptsError as error:
        _tell(files, str(error))
        raise
    finally:
        events.close()
    return outcome


def _tell(files: Sequence[Listener], text: str) -> None:
    """Adds to the logs what the console gets from the command's end; a log that fails too has nothing to add."""
    for listener in files:
        with contextlib.suppress(LoraScriptsError):
            listener.note(text, "warning")


def _require_writable(folder: Path) -> None:
    """Raises DataError, before any weight is read, when the output folder cannot take files."""
    probe = folder / f".write-test-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"output_dir: {folder}: cannot be written ({error.strerror}). Choose another folder.") from None


def _of_pictures(config: RunConfig, file: Path) -> str:
    trigger = f"{config.triggers[0]}, " if config.triggers else ""
    return (
        f"Use it: copy {file.name} to models/Lora (WebUI) or models/loras (ComfyUI) and write {trigger}... <lora:{config.name}:0.8>\n"
        f'Try it: lora-scripts sample --base-model {config.base_model} --prompt "{trigger}... <lora:{config.name}:0.8>" '
        f"--lora-dir {config.output_dir} --output pictures"
    )


def _of_dialogues(config: RunConfig, folder: Path) -> str:
    system = f' --system "{config.system_prompt}"' if config.system_prompt else ""
    return (
        f"Use it: {folder} is a PEFT folder, which transformers and vLLM load as it is (README.md in it)\n"
        f"Talk with it: lora-scripts chat --base-model {config.base_model} --lora {folder} --side-by-side{system}"
    )


NEXT_STEPS = {"text-to-image": _of_pictures, "text-generation": _of_dialogues}
"""Task -> what to do with the finished file or folder."""
