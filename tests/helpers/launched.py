"""Runs of `train.py` on several processes, as torch's launcher starts them."""

from __future__ import annotations

import json
import os
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


def losses(values: dict[str, Any]) -> list[float]:
    """Of every step, as the run's record has them."""
    lines = (Path(values["output_dir"]) / "record.jsonl").read_text("utf-8").splitlines()
    return [loss for line in map(json.loads, lines) if line["event"] == "stepped" for loss in line["losses"]]


def wait_for(folder: Path, timeout_s: float = 120.0) -> None:
    limit = time.monotonic() + timeout_s
    while not folder.is_dir():
        assert time.monotonic() < limit, f"{folder} did not appear"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that a process has started, in the order of their numbers."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()
    return sorted(map(int, found))
