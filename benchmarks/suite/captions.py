"""Captions: the labelling engine beside a plain loop over pictures with transformers.

Both sides run the same random BLIP on the same pictures with the same number of tokens. The plain loop is what a script on the web
does: open a picture, run the processor, call `generate`, decode. Each side is a process of its own (`caption_worker.py`)
and captions a folder of pictures in each turn; loading the model and a smaller folder before the first turn are not counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suite import STAND_INS
from suite.machine import load, machine_facts, said
from suite.telling import NOT_MEASURED, paired, spread, table
from suite.turns import Stepper, take_turns

TOKENS = 20
PICTURES = 64
WARM_UP_PICTURES = 16
SIDES = ("ours", "one at a time")


@dataclass(frozen=True)
class Contest:
    """Captions of one model.

    Attributes:
        precision: number format of ours.
        plain_precision: of the plain loop.
    """

    title: str
    size: str
    precision: str
    plain_precision: str
    device: str


def caption_contests(device: str, tiny: bool) -> dict[str, Contest]:
    half = "fp16" if device.startswith("cuda") else "bf16"
    size = "tiny" if tiny else "large"
    title = f"BLIP {size}, random weights"
    return {
        f"captions-{size}-defaults": Contest(
            f"{title}, as both come: ours in {half}, the published model's fp32", size, half, "fp32", device
        ),
        **{
            f"captions-{size}-{precision}": Contest(f"{title}, {precision}", size, precision, precision, device)
            for precision in (half, "fp32")
        },
    }


def is_label_contest(name: str) -> bool:
    return name.startswith("captions-")


def make_pictures(folder: Path, count: int) -> None:
    """Photographs in size, of smooth colours: 1600 x 1200 JPEG."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        small = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        large = Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC)
        large.save(folder / f"{number:03}.jpg", quality=92)


def make_model(folder: Path, size: str) -> Path:
    from helpers.tiny_captioners import write_blip, write_full_size_blip

    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_blip(folder) if size == "tiny" else write_full_size_blip(folder, size=size)
    return folder


def hold(contest: Contest, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured of one contest."""
    count = options.pictures or PICTURES
    model = make_model(place / "bases" / f"blip-{contest.size}", contest.size)
    running: list[Stepper] = []
    first: dict[str, float] = {}
    try:
        for name in SIDES:
            folder = place / "runs" / f"captions {name}"
            shutil.rmtree(folder, ignore_errors=True)
            turns = [folder / f"turn-{number}" for number in range(options.steps + 1)]
            for number, pictures in enumerate(turns):
                make_pictures(pictures, count if number else min(count, WARM_UP_PICTURES))
            job = {
                "ours": name == "ours",
                "model": str(model),
                "pictures": [str(pictures) for pictures in turns],
                "precision": contest.precision if name == "ours" else contest.plain_precision,
                "candidates": options.candidates,
                "tokens": TOKENS,
                "device": contest.device,
                "threads": options.threads,
            }
            (folder / "job.json").write_text(json.dumps(job) + "\n", "utf-8")
            words = [sys.executable, str(STAND_INS / "caption_worker.py"), str(folder / "job.json")]
            running.append(Stepper(name, words, folder, options.threads))
            first[name] = running[-1].first_step_s
            print(
                f"  {name}: first {running[-1].facts['num_captioned']} captions after {first[name]:.1f} s", flush=True
            )
        told = take_turns(running, options.steps)
    finally:
        for stepper in running:
            stepper.close()
    sides = {
        stepper.name: {
            "first_captions_s": first[stepper.name],
            "wall_s": [turn["wall_s"] / turn["num_captioned"] for turn in turns_told],
            "cpu_s": [turn["cpu_s"] / turn["num_captioned"] for turn in turns_told],
            "peak_bytes": turns_told[-1]["peak_bytes"],
            "peak_cuda_bytes": turns_told[-1].get("peak_cuda_bytes"),
        }
        for stepper, turns_told in zip(running, told, strict=True)
    }
    machine = machine_facts(contest.device, options.threads)
    shaping = {"pictures": count, "candidates": options.candidates, "tokens": TOKENS}
    return {"contest": asdict(contest), **shaping, "machine": machine, "load": load(), "sides": sides}


# Telling --------------------------------------------------------------------------------------------------------------

HEADS = (
    "what captions",
    "how",
    "s per picture",
    "CPU s per picture",
    "first captions, s",
    "peak memory, GB",
    "ours is faster: paired by turn",
    "by CPU time",
)


def tell(contests: Mapping[str, Contest], found: Mapping[str, Any], reason: str) -> str:
    """The table, and what it was taken with.

    Args:
        reason: why a contest that has no result has none.
    """
    rows: list[list[str]] = []
    for name, contest in contests.items():
        if name not in found:
            rows.append([contest.title, "both", f"{NOT_MEASURED}: {reason}", *["-"] * (len(HEADS) - 3)])
            continue
        sides = found[name]["sides"]
        for how, side in sides.items():
            memory = side["peak_cuda_bytes"] or side["peak_bytes"]
            ratios = [spread(paired(side[what], sides["ours"][what])) for what in ("wall_s", "cpu_s")]
            cells = [spread(side["wall_s"]), spread(side["cpu_s"]), f"{side['first_captions_s']:.1f}"]
            cells += [f"{memory / 1e9:.1f}", *(["-", "-"] if how == "ours" else ratios)]
            rows.append([contest.title, how, *cells])
    lines = [table(HEADS, rows)]
    for name in contests:
        if name in found:
            result = found[name]
            lines.append(
                f"`{name}`: {len(result['sides']['ours']['wall_s'])} timed turns of {result['pictures']} pictures each, "
                f"{result['tokens']} tokens, {result['candidates']} captions for each, load of the machine "
                f"{result['load']:.1f}. {said(result['machine'])}\n"
            )
    return "\n".join(lines)
