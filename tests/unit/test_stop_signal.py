"""When a signal interrupts a run at once, and when the run ends after its step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_scripts.stop_signal import StopSignal
from lora_scripts.training.events import RunStart

RUN = RunStart(settings={}, facts=(), captions=(), first_step=5, max_steps=20)


@pytest.fixture
def of_two() -> Iterator[StopSignal]:
    """Of one of two processes, its handlers in place."""
    stop = StopSignal(num_processes=2)
    with stop.installed():
        yield stop


def test_one_process_without_unsaved_steps_is_interrupted_at_once() -> None:
    stop = StopSignal()
    with stop.installed():
        stop.started(RUN)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_unsaved_steps_are_saved_first() -> None:
    stop = StopSignal()
    with stop.installed():
        stop.started(RUN)
        stop.ticked(6)
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        stop.saved(6, Path())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_one_of_several_processes_ends_after_its_step_though_nothing_is_unsaved(of_two: StopSignal) -> None:
    of_two.started(RUN)
    signal.raise_signal(signal.SIGTERM)
    assert of_two()


def test_one_of_several_processes_is_interrupted_at_once_while_nothing_is_trained_yet(of_two: StopSignal) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_interrupts_one_of_several_processes_too(of_two: StopSignal) -> None:
    of_two.started(RUN)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
