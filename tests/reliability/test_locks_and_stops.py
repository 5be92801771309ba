"""Two runs on one folder, stop signals at every phase, and a clock that is set back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_scripts import run_lock
from lora_scripts.config import RunConfig
from lora_scripts.errors import ResumeError, TrainingError
from lora_scripts.pipeline import Outcome
from lora_scripts.train_command import train_and_report
from lora_scripts.training.checkpoint import newest_checkpoint
from lora_scripts.training.events import Listener, Preview

Settings = Callable[..., dict[str, Any]]


def train(values: dict[str, Any], *more: Listener) -> Outcome:
    return train_and_report(RunConfig.model_validate(values), more=more)


def result(values: dict[str, Any]) -> bytes:
    from safetensors.torch import load_file, save

    return save(load_file(Path(values["output_dir"]) / "run.safetensors"))


@pytest.fixture
def other_process() -> Any:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def write_lock(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    owner = run_lock.Owner.this_process()
    path = folder / run_lock.FILE_NAME
    path.write_text(json.dumps(vars(owner) | changes))
    return path


@pytest.mark.fault(29)
def test_second_run_is_refused_with_the_first_ones_process(settings: Settings, other_process: Any) -> None:
    values = settings()
    folder = Path(values["output_dir"])
    lock = write_lock(folder, pid=other_process.pid, mark=run_lock.process_mark(other_process.pid))
    with pytest.raises(ResumeError, match=rf"another run, process {other_process.pid}, is writing there"):
        train(values)
    assert [path.name for path in folder.iterdir()] == [lock.name]


@pytest.mark.fault(29)
def test_lock_of_a_dead_or_another_program_is_taken_over(tmp_path: Path, other_process: Any) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    reused = {"pid": other_process.pid, "mark": "an older process of this number"}
    for left in ({"pid": dead.pid}, reused):
        path = write_lock(tmp_path, **left)
        with run_lock.locked(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []
    path.write_text('{"pid": 12')  # cut off while it was written
    with run_lock.locked(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.fault(29)
def test_lock_of_another_machine_is_kept_and_the_way_on_is_said(tmp_path: Path) -> None:
    path = write_lock(tmp_path, host="elsewhere")
    with pytest.raises(ResumeError, match=r"elsewhere.*delete .*run-lock"), run_lock.locked(tmp_path):
        pass
    assert path.exists()


@pytest.mark.fault(29)
def test_process_mark_tells_processes_apart_and_stays_the_same(other_process: Any) -> None:
    mine = run_lock.process_mark(os.getpid())
    assert mine
    assert mine == run_lock.process_mark(os.getpid())
    assert mine != run_lock.process_mark(other_process.pid)


class At(Listener):
    """Does something at one moment of a run."""

    def __init__(self, moment: str, act: Callable[[], None], step: int = 3) -> None:
        self.moment, self.act, self.step = moment, act, step

    def note(self, text: str, level: str = "info") -> None:
        if self.moment == "loading" and text.startswith("Base model"):
            self.act()

    def progress(self, what: str, done: int, total: int) -> None:
        if self.moment == ("checking" if what == "check" else "caching") and 0 < done < total:
            self.act()

    def ticked(self, step: int) -> None:
        if self.moment == "step" and step == self.step:
            self.act()

    def saved(self, step: int, folder: Path) -> None:
        if self.moment == "saved" and step == 4:
            self.act()

    def previewed(self, preview: Preview) -> None:
        if self.moment == "preview" and preview.step == self.step:
            self.act()


@pytest.fixture(scope="module")
def unbroken() -> dict[str, bytes]:
    """The result of the run that nothing stopped, once it is known; it does not depend on the folder."""
    return {}


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def press_twice() -> None:
    press()
    press()


@pytest.mark.fault(25)
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on POSIX")
@pytest.mark.parametrize("act", [press, press_twice])
@pytest.mark.parametrize("moment", ["loading", "checking", "caching", "step", "saving", "saved", "preview"])
def test_stop_at_any_moment_leaves_a_whole_checkpoint(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    act: Callable[[], None],
    unbroken: dict[str, bytes],
) -> None:
    more = {"sample_every": 3, "sample_prompts": ["a red cat"], "sample_steps": 1, "max_steps": 4}
    if "unbroken" not in unbroken:
        whole = settings(output_dir=str(tmp_path / "a" / "run"), **more)
        train(whole)
        unbroken["unbroken"] = result(whole)
    # Checking and caching are stopped on other pictures' encodings: a cache of its own.
    stopped = settings(output_dir=str(tmp_path / "b" / "run"), cache_dir=str(tmp_path / "cache"), **more)
    began = time.monotonic()
    with monkeypatch.context() as patch:
        if moment == "saving":
            plain, calls = os.fsync, iter(range(1000))

            def fsync(descriptor: int) -> None:
                if next(calls) == 1:
                    act()
                plain(descriptor)

            patch.setattr(os, "fsync", fsync)
        with contextlib.suppress(KeyboardInterrupt):
            train(
                stopped, At(moment, act)
            )  # asked within the last preview, it ends with the last step, which is one more
    assert time.monotonic() - began < 45
    loaded, notes = newest_checkpoint(Path(stopped["output_dir"]))
    assert notes == []
    if moment in ("saved", "preview"):
        assert loaded is not None
    if moment == "step":
        assert loaded is not None
        assert loaded.step == (3 if act is press else 2)
    assert train(stopped).complete
    assert result(stopped) == unbroken["unbroken"]


@pytest.mark.fault(25)
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on POSIX")
def test_step_that_does_not_end_is_interrupted_in_time(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_scripts.stop_signal._GRACE_S", 0.3)

    def hang() -> None:
        press()
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(settings(), At("step", hang))
    assert time.monotonic() - began < 20


@pytest.mark.fault(30)
def test_clock_that_jumps_back_changes_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings(output_dir=str(tmp_path / "a" / "run"))
    train(whole)
    shifted = settings(output_dir=str(tmp_path / "b" / "run"))
    now = time.time()

    def act() -> None:
        monkeypatch.setattr(time, "time", lambda: now - 86_400 * 400)
        press()

    assert not train(shifted, At("step", act)).complete
    monkeypatch.setattr(time, "time", lambda: now - 86_400 * 800)
    assert train(shifted).complete
    assert result(whole) == result(shifted)
    steps = [json.loads(line) for line in (tmp_path / "b/run/record.jsonl").read_text("utf-8").splitlines()]
    assert steps


@pytest.mark.fault(5)
def test_folder_taken_by_another_run_is_not_written(tmp_path: Path, other_process: Any) -> None:
    write_lock(tmp_path, pid=other_process.pid, mark=run_lock.process_mark(other_process.pid))
    with pytest.raises(TrainingError, match=rf"belongs to process {other_process.pid}"):
        run_lock.require_own_folder(tmp_path)
