"""A trainer that takes its steps one at a time, when it is told to, and says what each cost.

Two trainers in processes of their own can so be timed in turns, step by step, on a machine that other programs use too: while
one runs, the other waits and costs nothing. Nothing but the standard library is needed, so every interpreter can read this file.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


class Gate:
    """The trainer's side: facts go out as lines of JSON, every line that comes in lets one step begin.

    What the trainer itself prints goes to standard error from here on.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._step = 0
        self._began: tuple[float, float] | None = None

    def tell(self, **facts: Any) -> None:
        self._out.write(json.dumps(facts) + "\n")

    def pause(self) -> str:
        """Between two steps: says what the last one cost, and waits; the line that lets the next one begin.

        Told are the process's own CPU seconds and the wall clock of the step, and the most memory it ever held. Ends the
        process when nobody is there any more.
        """
        facts: dict[str, Any] = {"step": self._step}
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # what was started is done only then
            facts["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        if self._began is not None:
            facts["cpu_s"] = time.process_time() - self._began[0]
            facts["wall_s"] = time.perf_counter() - self._began[1]
        facts["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.tell(**facts)
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # what trainers do at the end of a run is not measured
        self._step += 1
        self._began = (time.process_time(), time.perf_counter())
        return line.strip()
