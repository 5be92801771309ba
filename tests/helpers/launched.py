"""Runs of `train.py` on several processes, as torch's launcher starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def command(values: dict[str, Any], num_processes: int) -> list[str]:
    """train.py on so many processes."""
    config = Path(values["output_dir"]).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values), "utf-8")
    return [sys.executable, *launcher(num_processes), str(ROOT / "train.py"), "--config", str(config)]


def launcher(num_processes: int) -> list[str]:
    """What stands between python and the script; nothing for one process."""
    if num_processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def run(values: dict[str, Any], num_processes: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(values, num_processes), capture_output=True, text=True, env=environment(), check=False, timeout=300
    )


def launched(script: Any, num_processes: int, *arguments: str) -> None:
    """Runs a script of the helpers on so many processes, to its end."""
    words = [sys.executable, *launcher(num_processes), str(Path(script.__file__)), *arguments]
    result = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False, timeout=600)
    assert result.returncode == 0, result.stderr


def losses(values: dict[str, Any]) -> list[float]:
    """Of every step, as the run's record has them."""
    lines = (Path(values["output_dir"]) / "record.jsonl").read_text("utf-8").splitlines()
    return [loss for line in map(json.loads, lines) if line["event"] == "stepped" for loss in line["losses"]]


def killed(values: dict[str, Any], num_processes: int, victim: int) -> tuple[str, int]:
    """Kills one process of a run that has saved step 5; what the run printed, and the last step that it has saved."""
    with _started(values, num_processes) as run_started:
        wait_for(Path(values["output_dir"]) / "checkpoint-5")
        os.kill(children(run_started.pid)[victim], signal.SIGKILL)
        output, _ = run_started.communicate(timeout=120)
    assert run_started.returncode != 0
    return output, max(int(path.name.partition("-")[2]) for path in Path(values["output_dir"]).glob("checkpoint-*"))


def stopped(values: dict[str, Any], num_processes: int, step: int) -> str:
    """Lets a run go on until it has saved a step, then asks it to stop; what it printed."""
    with _started(values, num_processes) as run_started:
        wait_for(Path(values["output_dir"]) / f"checkpoint-{step}")
        run_started.send_signal(signal.SIGTERM)
        output, _ = run_started.communicate(timeout=120)
    return output


def resumed_alone_at_10(values: dict[str, Any], finished: str) -> None:
    """Takes away what a run of 20 steps on several processes ended with, and lets one process go on from step 10."""
    for name in (finished, "checkpoint-20"):
        path = Path(values["output_dir"]) / name
        path.rename(path.with_name(f"gone-{name}"))
    result = run(values, 1)
    assert result.returncode == 0, result.stderr
    assert "Resuming after step 10" in result.stdout


def _started(values: dict[str, Any], num_processes: int) -> subprocess.Popen[str]:
    words = command(values, num_processes)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def wait_for(folder: Path, timeout_s: float = 120.0) -> None:
    limit = time.monotonic() + timeout_s
    while not folder.is_dir():
        assert time.monotonic() < limit, f"{folder} did not appear"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that a process has started, in the order of their numbers."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    return sorted(map(int, found))
