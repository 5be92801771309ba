"""Ctrl-C and SIGTERM: what is unsaved is saved first, and within 45 seconds the run has ended."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lora_scripts.training.events import Listener, RunStart

__all__ = ["StopSignal"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_S = 30.0
"""How long a step or preview may take to end after the first signal; saving comes on top of it."""

Handler = Callable[[int, FrameType | None], None]


class StopSignal(Listener):
    """Becomes true when a run shall save and end after its step; without unsaved steps it interrupts at once.

    Several processes always end after their step: all of them stop at the same one, and where the signal only came because
    another process was lost, the next exchange finds that out and says so.

    A second signal interrupts at once in any case, and so does a step that does not end in time. The newest
    checkpoint is whole even then, because a checkpoint's folder appears under its name only when it is complete.
    """

    def __init__(self, grace_s: float | None = None, *, num_processes: int = 1) -> None:
        self._together = False
        self._num_processes = num_processes
        self._asked = threading.Event()
        self._grace_s = _GRACE_S if grace_s is None else grace_s
        self._trained = self._kept = 0
        self._timer: threading.Timer | None = None

    def __call__(self) -> bool:
        return self._asked.is_set()

    def started(self, run: RunStart) -> None:
        self._trained = self._kept = run.first_step
        self._together = self._num_processes > 1

    def ticked(self, step: int) -> None:
        self._trained = step

    def saved(self, step: int, folder: Path) -> None:
        self._kept = step

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Signal handlers in place; only the main thread may set them, elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        nothing_to_save = self._trained == self._kept and not self._together
        if self._asked.is_set() or nothing_to_save:
            self._asked.set()
            raise KeyboardInterrupt
        self._asked.set()
        self._timer = threading.Timer(self._grace_s, _interrupt_main_thread)
        self._timer.daemon = True
        self._timer.start()


def _interrupt_main_thread() -> None:
    """A second signal; on POSIX a real one, which also ends a wait inside the system."""
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
