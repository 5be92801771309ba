"""Lives of one run: each is a forked process that runs the real command and dies by SIGKILL at a random moment.

Run as a program: `python attempts.py PLAN.json`, prints what happened as JSON. Forking a process that has imported
everything saves the five seconds that importing torch takes; the kill is as real as any.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

IMPORTED_BEFORE_THE_FORK = [
    "lora_scripts.pipeline", "lora_scripts.report.build", "lora_scripts.training.console", "lora_scripts.training.record",
    "lora_scripts.training.resume", "lora_scripts.training.tensorboard",
]  # fmt: skip


def one_life(settings: dict[str, Any], log: Path) -> int:
    """Starts the command in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        from lora_scripts.config import RunConfig
        from lora_scripts.train_command import train_command

        code = train_command(RunConfig.model_validate(settings))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int, patience_s: float) -> int | None:
    """The exit code if it ends in time, negative after a signal."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def moment(rng: random.Random, whole_life_s: float, output_dir: Path, child: int) -> int | None:
    """Waits until the next kill: anywhere in a life, or, one time in four, while a checkpoint is being written."""
    if rng.random() < 0.25:
        until = time.monotonic() + whole_life_s
        while time.monotonic() < until:
            if any(path.name.endswith(".partial") for path in output_dir.glob("checkpoint-*")):
                time.sleep(rng.uniform(0, 0.004))
                return ended(child, 0.001)
            if (code := ended(child, 0.001)) is not None:
                return code
        return None
    return ended(child, rng.uniform(0.02, 1.0) * whole_life_s)


def main(plan: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    for name in [*IMPORTED_BEFORE_THE_FORK, *plan["imported"]]:
        importlib.import_module(name)
    # The header holds the dates of a run; with the clock standing still, whole files can be compared.
    time.time = lambda: 1_750_000_000.0
    rng = random.Random(plan["seed"])
    log = Path(plan["log"])
    began = time.monotonic()
    code = ended(one_life(plan["unbroken"], log), 120)
    if code != 0:
        return {"failed": f"the unbroken run ended with {code}"}
    unbroken_s = time.monotonic() - began
    kills, saving, finished = 0, 0, []
    while kills < plan["kills"] or not finished or not Path(finished[-1]).exists():
        output_dir = Path(plan["folder"]) / str(len(finished)) / "run"
        output_dir.mkdir(parents=True, exist_ok=True)
        code = None
        while code is None:
            # What may change from life to life without changing the result.
            changes = rng.choice(plan["free_changes"])
            child = one_life(plan["unbroken"] | changes | {"output_dir": str(output_dir)}, log)
            if kills >= plan["kills"]:
                code = ended(child, 120)
                break
            code = moment(rng, plan["life"] * unbroken_s, output_dir, child)
            if code is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                saving += any(path.name.endswith(".partial") for path in output_dir.iterdir())
        if code != 0:
            return {"failed": f"after {kills} kills a run ended with {code}"}
        finished.append(str(output_dir / plan["file"]))
    return {"kills": kills, "while saving": saving, "finished": finished, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text("utf-8")))))
