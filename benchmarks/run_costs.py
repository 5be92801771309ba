"""What a run spends beside its steps: on the validation loss, on checkpoints, and on choosing among them by pictures.

    python benchmarks/run_costs.py [--steps 600] [--pictures 48] [--runs 3]

A run with the settings that a user gets without asking, on the built-in model. Time is that of the calls themselves, as
a share of the time from the start of the first step to the end of the last one; previews are off, since their number is
the user's choice, so every picture of the choice is rendered for it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    from lora_scripts.choosing import chooser
    from lora_scripts.training import loop, resume, validation

    clock = {"validation": Stopwatch(), "checkpoints": Stopwatch(), "choice": Stopwatch(), "all": Stopwatch()}
    clock["validation"].watch(validation.Validator, "measure")
    clock["checkpoints"].watch(resume.Resumable, "save")
    clock["choice"].watch(chooser.Chooser, "put_best_back")
    clock["all"].watch(loop, "train")

    shares: dict[str, list[float]] = {"validation": [], "checkpoints": [], "choice": []}
    for _ in range(options.runs):
        for watch in clock.values():
            watch.seconds.clear()
        with tempfile.TemporaryDirectory() as place:
            num_bytes = train(Path(place), options.steps, options.pictures)
        # The measurement before the first step lies outside the loop and counts all the same.
        whole = sum(clock["all"].seconds) + clock["validation"].seconds[0]
        for name, values in shares.items():
            values.append(sum(clock[name].seconds) / whole)
    print(f"{options.steps} steps of batch 4, {options.pictures} pictures, save_steps 100, {options.runs} runs")
    for name, values in shares.items():
        each = statistics.median(clock[name].seconds)
        print(
            f"{name}: {len(clock[name].seconds)} times {1000 * each:.0f} ms, {100 * statistics.median(values):.2f} % of the run "
            f"({100 * min(values):.2f} to {100 * max(values):.2f} %)"
        )
    print(f"a checkpoint: {num_bytes / 1e6:.1f} MB, every byte flushed to the disk and hashed")


class Stopwatch:
    """The seconds of every call of a function."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def watch(self, owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return plain(*arguments, **named)
            finally:
                self.seconds.append(time.perf_counter() - began)

        setattr(owner, name, timed)


def train(folder: Path, steps: int, num_pictures: int) -> int:
    """One run; the bytes of its last checkpoint."""
    from first_step import draw_pictures

    from lora_scripts.config import RunConfig
    from lora_scripts.train_command import train_and_report

    draw_pictures(folder / "pictures", num_pictures, 128)
    config = RunConfig(
        train_data_dir=folder / "pictures",
        base_model="builtin:mini-sd",
        output_dir=folder / "run",
        max_steps=steps,
        sample_every=0,
    )
    train_and_report(config)
    return sum(path.stat().st_size for path in (folder / "run" / f"checkpoint-{steps}").iterdir())


if __name__ == "__main__":
    main()
