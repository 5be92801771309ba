"""Training on pictures, beside the peers: speed, time to the first step, memory, and how far the losses are apart."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suite.machine import load, machine_facts, matmul_peak, said
from suite.materials import SEED, make_base, make_pictures
from suite.telling import NOT_MEASURED, paired, spread, table
from suite.trainers import TEXT_ENCODER, TRANSFORMER, Peer, Work, command_of, forget_caches
from suite.turns import Facts, Stepper, take_turns

WARM_UP = 3
"""Steps after the first one that are not timed: weights are put into order, and passes recorded, in them."""


@dataclass(frozen=True)
class Contest:
    """The same work for our side and one peer.

    Attributes:
        title: what is trained, for the table.
        peer: its kind; None where nobody else can train this.
        how: what is special about the peer's settings.
    """

    title: str
    work: Work
    peer: str | None
    how: str = ""


FASTEST = ("diffusers", "sd-scripts-best")
"""Of `alike`, what a GPU is measured beside."""


def alike(title: str, work: Mapping[str, Any]) -> dict[str, Contest]:
    """The same model beside every peer, each with the layers that it trains."""
    scripts = {"layers": TRANSFORMER, "init": "kaiming"}
    encoder = {"layers": (*TRANSFORMER, *TEXT_ENCODER), "init": "kaiming", "train_text_encoder": True}
    best = "network_train_unet_only, cached, sdpa"
    return {
        "diffusers": Contest(title, Work(**work), "diffusers"),
        "sd-scripts-default": Contest(
            f"{title}, text encoder too", Work(**work, **encoder), "sd-scripts", "its defaults"
        ),
        "sd-scripts-cached": Contest(
            f"{title}, text encoder too", Work(**work, **encoder, cached=True), "sd-scripts", "cached latents"
        ),
        "sd-scripts-best": Contest(title, Work(**work, **scripts, cached=True, sdpa=True), "sd-scripts", best),
    }


def cpu_contests(tiny: bool) -> dict[str, Contest]:
    title = "builtin:mini-sd, 128 px, batch 8"
    found = {
        "mini": Contest(f"{title}, bf16", Work("mini-sd", 128, 8, precision="bf16"), "diffusers"),
        "mini-fp32": Contest(
            f"{title}, fp32, the default of both", Work("mini-sd", 128, 8, precision="fp32"), "diffusers"
        ),
    }
    if not tiny:
        full = alike("SD 1.5, 512 px, batch 1", {"family": "sd15", "side": 512, "batch_size": 1})
        found = {**{f"sd15-{name}": contest for name, contest in full.items()}, **found}
    return found


def gpu_contests(device: str, tiny: bool) -> dict[str, Contest]:
    """On a GPU, or what takes the same way at a small size."""
    if tiny:
        small = {"batch_size": 4, "device": device}
        return {
            "sd15-b4-diffusers": Contest("mini-sd, 64 px, batch 4", Work("mini-sd", 64, **small), "diffusers"),
            "sdxl-b4-diffusers": Contest("tiny SDXL, 64 px, batch 4", Work("tiny-sdxl", 64, **small), "diffusers"),
        }
    found = {}
    for name, title, family, side, batch_size in (
        ("sd15-b4", "SD 1.5, 512 px, batch 4", "sd15", 512, 4),
        ("sdxl-b1", "SDXL, 1024 px, batch 1", "sdxl", 1024, 1),
        ("sdxl-b4", "SDXL, 1024 px, batch 4", "sdxl", 1024, 4),
    ):
        work = {"family": family, "side": side, "batch_size": batch_size, "device": device}
        found |= {f"{name}-{peer}": contest for peer, contest in alike(title, work).items() if peer in FASTEST}
    return found


# Running --------------------------------------------------------------------------------------------------------------


def hold(contest: Contest, peers: Mapping[str, Peer], place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured of one contest."""
    work = contest.work
    num_steps = 1 + WARM_UP + options.steps + 1  # the last one is counted instead of timed
    base = make_base(place / "bases", work.family)
    pictures = make_pictures(
        place / f"pictures-{work.side}-{work.batch_size}", side=work.side, batch_size=work.batch_size, steps=num_steps
    )
    sides: dict[str, Peer | None] = {"ours": None}
    if contest.peer in peers:
        sides[str(contest.peer)] = peers[str(contest.peer)]
    folders = {name: place / "runs" / name for name in sides}

    def start(name: str) -> Stepper:
        command = command_of(sides[name], work, base, pictures, folders[name])
        return command.start(name, folders[name], options.threads)

    first: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in sides}
    for name in sides:
        forget_caches(pictures, folders[name])
        stepper = start(name)
        stepper.close()
        first[name]["cold"].append(stepper.first_step_s)
        print(f"  {name}: first step after {stepper.first_step_s:.1f} s, nothing cached", flush=True)
    running: list[Stepper] = []
    try:
        for number in range(options.starts):
            for name in sides:
                stepper = start(name)
                first[name]["warm"].append(stepper.first_step_s)
                print(f"  {name}: first step after {stepper.first_step_s:.1f} s, with its caches", flush=True)
                if number + 1 < options.starts:
                    stepper.close()
                else:
                    running.append(stepper)
        return {
            "contest": asdict(contest),
            "seed": SEED,
            "machine": machine_facts(work.device, options.threads),
            "num_pictures": num_steps * work.batch_size,
            **timed(running, work, options),
            "first_step_s": first,
        }
    finally:
        for stepper in running:
            stepper.close()


def timed(running: Sequence[Stepper], work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Steps in turns, and our last one counted; how fast matrices are multiplied is measured before, and again after."""
    firsts = [dict(stepper.facts) for stepper in running]
    if len({facts["num_trained"] for facts in firsts}) > 1:
        told = ", ".join(f"{each.name} {facts['num_trained']}" for each, facts in zip(running, firsts, strict=True))
        sys.exit(f"not the same number of weights is trained: {told}")
    peaks = [matmul_peak(work.device, work.precision, options.threads)]
    before = take_turns(running, WARM_UP)
    steps = take_turns(running, options.steps)
    peaks.append(matmul_peak(work.device, work.precision, options.threads))
    counted = running[0].step("flops")
    return {
        "sides": {
            stepper.name: side(stepper, [facts, *warm_up], timed_steps, work)
            for stepper, facts, warm_up, timed_steps in zip(running, firsts, before, steps, strict=True)
        },
        "flops_per_step": counted["flops"],
        "matmul_peak": peaks,
        "load": load(),
    }


def side(stepper: Stepper, untimed: Sequence[Facts], steps: Sequence[Facts], work: Work) -> dict[str, Any]:
    # Ours takes the sum over the pictures backward and divides afterwards, a peer their mean.
    count = work.batch_size if stepper.name == "ours" else 1
    return {
        "versions": stepper.facts["versions"],
        "num_trained": steps[-1]["num_trained"],
        "wall_s": [step["wall_s"] for step in steps],
        "cpu_s": [step["cpu_s"] for step in steps],
        "losses": [step["loss"] / count for step in [*untimed, *steps]],
        "peak_bytes": steps[-1]["peak_bytes"],
        "peak_cuda_bytes": steps[-1].get("peak_cuda_bytes"),
    }


# Telling --------------------------------------------------------------------------------------------------------------

HEADS = (
    "what is trained",
    "trainer",
    "s per step",
    "CPU s per step",
    "first step, s: nothing cached",
    "with its caches",
    "peak memory, GB",
    "of the matrix peak",
    "ours is faster: paired by turn",
    "by CPU time",
    "losses apart: most",
    "mean",
)


def tell(contests: Mapping[str, Contest], found: Mapping[str, Any], reason: str) -> str:
    """The table, and what it was taken with.

    Args:
        reason: why a contest that has no result has none.
    """
    rows: list[list[str]] = []
    for name, contest in contests.items():
        if name in found:
            rows += result_rows(contest, found[name])
        if name not in found or contest.peer not in found[name]["sides"]:
            why = reason if name not in found else "this peer was not given"
            rows.append([contest.title, trainer_name(contest), f"{NOT_MEASURED}: {why}", *["-"] * (len(HEADS) - 3)])
    lines = [table(HEADS, rows)]
    for name in contests:
        if name in found:
            lines.append(footnote(name, found[name]))
    return "\n".join(lines)


def trainer_name(contest: Contest) -> str:
    return f"{contest.peer}, {contest.how}" if contest.how else str(contest.peer)


def result_rows(contest: Contest, result: Mapping[str, Any]) -> list[list[str]]:
    ours, rows = result["sides"]["ours"], []
    for name, side in result["sides"].items():
        first = result["first_step_s"][name]
        memory = side["peak_cuda_bytes"] or side["peak_bytes"]
        cells = [spread(side["wall_s"]), spread(side["cpu_s"]), spread(first["cold"], 1), spread(first["warm"], 1)]
        cells.append(f"{memory / 1e9:.1f}")
        if name == "ours":
            share = result["flops_per_step"] / statistics.median(side["wall_s"]) / max(result["matmul_peak"])
            cells += [f"{100 * share:.0f} %", *["-"] * 4]
        else:
            apart = [abs(a - b) / b for a, b in zip(ours["losses"], side["losses"], strict=True)]
            means = [statistics.fmean(each["losses"]) for each in (ours, side)]
            cells += ["-", spread(paired(side["wall_s"], ours["wall_s"])), spread(paired(side["cpu_s"], ours["cpu_s"]))]
            cells += [f"{100 * max(apart):.2f} %", f"{100 * abs(means[0] - means[1]) / means[1]:.2f} %"]
        rows.append([contest.title, "ours" if name == "ours" else trainer_name(contest), *cells])
    return rows


def footnote(name: str, result: Mapping[str, Any]) -> str:
    work, ours = result["contest"]["work"], result["sides"]["ours"]
    peers = [
        f"{who}: {', '.join(f'{package} {number}' for package, number in side['versions'].items())}."
        for who, side in result["sides"].items()
        if who != "ours"
    ]
    peak = ", ".join(f"{value / 1e12:.2f}" for value in result["matmul_peak"])
    sentence = (
        f"`{name}`: {len(ours['wall_s'])} timed steps in turns, {result['num_pictures']} pictures, {work['precision']}, "
        f"rank {work['rank']}, rate {work['rate']:g}, {ours['num_trained']:,} weights trained, "
        f"{result['flops_per_step'] / 1e12:.3f} TFLOP in a step of ours, matrix products {peak} TFLOP/s before and after, "
        f"load of the machine {result['load']:.1f}. {said(result['machine'])} {' '.join(peers)}"
    )
    return sentence.strip() + "\n"
