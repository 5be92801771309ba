"""Processes that take their steps in turns, so that what else the machine does meets all alike.

The processes talk as `stand_ins/gate.py` does: lines of JSON come out, a line that goes in lets one step begin.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


class Stepper:
    """One process at work, which stands still after every step; the first one is taken without waiting.

    Attributes:
        facts: what it told last, of the step and of itself.
        first_step_s: from the start of the process to the end of its first step.
    """

    def __init__(
        self, name: str, words: Sequence[str], work: Path, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.facts: Facts = {}
        work.mkdir(parents=True, exist_ok=True)
        self._log = work / "output.txt"
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **(environment or {}),
        }
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                list(words),
                env=variables,
                cwd=work,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self.first_step_s = time.perf_counter() - began

    def step(self, how: str = "") -> Facts:
        """Takes one step: what it told, with its `cpu_s` and `wall_s`; `how` is the line that it is sent."""
        assert self._process.stdin is not None
        self._process.stdin.write(how + "\n")
        self._process.stdin.flush()
        return self._wait()

    def close(self) -> None:
        """Ends it with all that it has started."""
        if self._process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _wait(self) -> Facts:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self.facts.update(told)
            if "step" in told:
                return dict(self.facts)
        end = self._log.read_text("utf-8", "replace")[-3000:]
        sys.exit(f"{self.name}: exit code {self._process.wait()}; the end of {self._log}:\n{end}")


def take_turns(steppers: Sequence[Stepper], rounds: int) -> list[list[Facts]]:
    """[process][round] what each told; who goes first changes from round to round."""
    told: list[list[Facts]] = [[] for _ in steppers]
    for number in range(rounds):
        first = number % len(steppers)
        for place in [*range(first, len(steppers)), *range(first)]:
            told[place].append(steppers[place].step())
        seconds = ", ".join(
            f"{each.name} {found[-1]['wall_s']:.2f} s" for each, found in zip(steppers, told, strict=True)
        )
        print(f"  turn {number + 1}: {seconds}", flush=True)
    return told
