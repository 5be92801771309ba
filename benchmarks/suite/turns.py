"""Trainers in processes of their own that take their steps in turns, so that what else the machine does meets all alike."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite import STAND_INS

Facts = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """How a trainer is started.

    Attributes:
        python: its interpreter.
        script, arguments: as after `python`.
        draws: a file of `equal_draws.py`, for a trainer that is not ours.
        stand_in: whether torchvision may be served where it is missing.
        environment: on top of this process's own.
    """

    python: str
    script: Path
    arguments: Sequence[str]
    draws: Path | None = None
    stand_in: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


class Trainer:
    """One trainer at work, which stands still after every optimizer step.

    Attributes:
        facts: what it last told: `loss` of the step, `peak_bytes`, ...
        first_step_s: from the start of the process to the end of its first step.
    """

    def __init__(self, name: str, command: Command, work: Path, threads: int) -> None:
        self.name = name
        self.facts: Facts = {}
        work.mkdir(parents=True, exist_ok=True)
        self._log = work / "output.txt"
        job = {
            "threads": threads,
            "draws": str(command.draws) if command.draws else None,
            "stand_in": command.stand_in,
        }
        (work / "job.json").write_text(json.dumps(job) + "\n", "utf-8")
        words = [command.python, str(STAND_INS / "watched.py"), str(work / "job.json"), str(command.script)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **command.environment,
        }
        began = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*words, *command.arguments],
                env=environment,
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
        """Takes one step: what it told, with its `cpu_s` and `wall_s`, and `flops` where `how` is "flops"."""
        assert self._process.stdin is not None
        self._process.stdin.write(how + "\n")
        self._process.stdin.flush()
        return self._wait()

    def close(self) -> None:
        """Ends it with all that it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait(self) -> Facts:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self.facts.update(told)
            if "step" in told:
                return dict(self.facts)
        end = self._log.read_text("utf-8", "replace")[-3000:]
        sys.exit(f"{self.name}: exit code {self._process.wait()}; the end of {self._log}:\n{end}")
