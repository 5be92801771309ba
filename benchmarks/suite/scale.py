"""Several processes: one and two measured on this machine's CPU, more of them simulated from the bytes that they exchange."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from suite import ROOT
from suite.machine import load, machine_facts, said
from suite.materials import SEED, make_pictures
from suite.telling import NOT_MEASURED, paired, spread, table
from suite.trainers import ATTENTION

WARM_UP = 3
ROUNDS = 2
BATCH = 4
"""Pictures of a step, however many processes share them."""


@dataclass(frozen=True)
class Case:
    """How many processes share a step, and with how many threads each."""

    processes: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.processes} process{'es' if self.processes > 1 else ''}, {self.threads} thread{'s' if self.threads > 1 else ''} each"


CASES = (Case(1, 1), Case(2, 1), Case(1, 2))


def measure(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs of every case, in turns: seconds per step, and the losses, which are the same on any number of processes."""
    steps = WARM_UP + options.steps
    pictures = make_pictures(place / "pictures", side=128, batch_size=BATCH, steps=4).plain
    wall: dict[str, list[float]] = {case.name: [] for case in CASES}
    losses: dict[str, list[float]] = {}
    for number in range(ROUNDS):
        for case in CASES:
            record = run(case, place / f"{number}-{case.processes}-{case.threads}", pictures, steps)
            stepped = [entry for entry in record if entry["event"] == "stepped"]
            seconds = [entry["seconds"] for entry in stepped]
            spent = [after - before for before, after in pairwise(seconds)][WARM_UP - 1 :]
            wall[case.name].append(statistics.median(spent))
            losses[case.name] = [loss for entry in stepped for loss in entry["losses"]]
            print(f"  {case.name}: {wall[case.name][-1]:.3f} s per step", flush=True)
    machine = machine_facts("cpu", 0)
    return {"machine": machine, "load": load(), "steps": options.steps, "wall_s": wall, "losses": losses}


def run(case: Case, place: Path, pictures: Path, steps: int) -> list[dict[str, Any]]:
    """The record of a run of the whole product."""
    import shutil

    import yaml

    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    settings = {
        "train_data_dir": str(pictures),
        "cache_dir": str(place.parent / "cache"),
        "base_model": "builtin:mini-sd",
        "device": "cpu",
        "mixed_precision": "fp32",
        "batch_size": BATCH // case.processes,
        "max_steps": steps,
        "log_steps": 1,
        "validation_pictures": 0,
        "sample_every": 0,
        "save_steps": steps,
        "seed": SEED,
        "output_dir": str(place / "run"),
    }
    (place / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
    words = [*(launcher if case.processes > 1 else []), str(ROOT / "train.py"), "--config", str(place / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    log = place / "output.txt"
    with log.open("wb") as file:
        done = subprocess.run([sys.executable, *words], env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{case.name}: exit code {done.returncode}; the end of {log}:\n{log.read_text('utf-8')[-3000:]}")
    return [json.loads(line) for line in (place / "run" / "record.jsonl").read_text("utf-8").splitlines()]


# Simulated ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """What processes talk over.

    Attributes:
        bandwidth: bytes per second in one direction.
        latency_s: of one message.
    """

    name: str
    bandwidth: float
    latency_s: float


LINKS = (
    Link("1 Gbit Ethernet", 0.117e9, 50e-6),
    Link("10 Gbit Ethernet", 1.17e9, 30e-6),
    Link("PCIe 4.0 x16", 25e9, 10e-6),
    Link("NVLink 4", 300e9, 5e-6),
)
"""Rates that such links reach, rounded down."""
STEP_S = {"sd15": 0.1, "sdxl": 0.4}
"""Assumed: what a fast GPU takes for a step of a few pictures. A slower one hides the same exchange better."""
PROCESSES = (2, 8, 32)


def adapter_bytes(family: str, rank: int) -> int:
    """Gradients in float32 of a LoRA on the U-Net's attention layers, which is what processes exchange in a step."""
    import torch

    from lora_scripts.adapters.targets import match_layers
    from lora_scripts.models.components import build_component
    from lora_scripts.models.published import published_config

    with torch.device("meta"):
        unet = build_component("unet", published_config("unet", family), family)
    layers = match_layers("unet", unet, ATTENTION).values()
    return 4 * sum(rank * (layer.weight.shape[0] + layer.weight.shape[1]) for layer in layers)


def exchange_s(num_bytes: int, processes: int, link: Link) -> float:
    """Seconds of a ring all-reduce: 2 (N - 1) messages, each of the Nth part.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    messages = 2 * (processes - 1)
    return messages * (num_bytes / processes / link.bandwidth + link.latency_s)


def simulated() -> str:
    rows = []
    for family, step_s in STEP_S.items():
        for rank in (8, 64):
            num_bytes = adapter_bytes(family, rank)
            for link in LINKS:
                cells = []
                for processes in PROCESSES:
                    spent = exchange_s(num_bytes, processes, link)
                    cells.append(f"{1000 * spent:.1f} ms, {processes * step_s / (step_s + spent):.1f}x")
                rows.append([family, str(rank), f"{num_bytes / 1e6:.1f}", f"{step_s:g}", link.name, *cells])
    heads = ["model", "rank", "MB per step", "step alone, s (assumed)", "link", *(f"{n} processes" for n in PROCESSES)]
    return table(heads, rows)


# Telling --------------------------------------------------------------------------------------------------------------


def tell(found: Mapping[str, Any]) -> str:
    rows, notes = [], ""
    if "processes" in found:
        result = found["processes"]
        wall, losses, alone = result["wall_s"], result["losses"], CASES[0].name
        for case in CASES:
            apart = max(abs(a - b) for a, b in zip(losses[case.name], losses[alone], strict=True))
            ratio = "-" if case.name == alone else spread(paired(wall[alone], wall[case.name]))
            rows.append([case.name, spread(wall[case.name], 3), ratio, f"{apart:.1e}"])
        notes = (
            f"\n`builtin:mini-sd`, steps of {BATCH} pictures in float32, {ROUNDS} runs of each case in turns, median of "
            f"{result['steps']} steps in each, load of the machine {result['load']:.1f}. "
            f"{result['machine']['processor']}, {result['machine']['cores']} cores. "
            f"{said(result['machine']).rpartition('process. ')[2]}\n"
        )
    else:
        rows = [[case.name, NOT_MEASURED, "-", "-"] for case in CASES]
    heads = ["measured, gloo on a CPU", "s per step", "faster than 1 process, 1 thread", "losses apart at most"]
    return (
        table(heads, rows)
        + notes
        + "\nSimulated, not measured: milliseconds of a ring all-reduce of the adapter's gradients, and how many times as many "
        "pictures N processes train in the same time when nothing of it is hidden behind the backward pass.\n\n"
        + simulated()
    )
