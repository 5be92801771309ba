"""Our side of `text_vs_peers.py`: the whole product, stopped between steps.

python benchmarks/stand_ins/train_ours.py CONFIG.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

from gate import Gate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import lora_scripts.pipeline as pipeline
from lora_scripts.config_file import load_config
from lora_scripts.training.events import Events, Listener, RunStart, StepReport


class Gatekeeper(Listener):
    """Waits before the first step and after every one."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def note(self, text: str, level: str = "info") -> None:
        print(text, flush=True)

    def started(self, run: RunStart) -> None:
        self._gate.pause()

    def stepped(self, report: StepReport) -> None:
        self._gate.tell(losses=list(report.losses))

    def ticked(self, step: int) -> None:
        self._gate.pause()


if __name__ == "__main__":
    pipeline.run(load_config(Path(sys.argv[1]))[0], Events([Gatekeeper(Gate())]))
