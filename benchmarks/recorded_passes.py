"""Steps of one run in turns, with recorded passes and with plain ones: what recording saves and what it costs.

    python benchmarks/recorded_passes.py [--threads 2] [--steps 40] [--full] [--update-docs]

Within one run every other step is plain, so whatever else the machine does meets both alike. `--full` adds Stable Diffusion
1.5 of full size with random weights, which takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from loss_curves import run_values  # which makes src importable
from suite.machine import processor
from suite.materials import make_base, make_pictures
from suite.telling import table, update_docs

from lora_scripts.config import RunConfig
from lora_scripts.families.protocol import Batch, Loss
from lora_scripts.train_command import train_and_report
from lora_scripts.training import speed
from lora_scripts.training.events import Listener
from lora_scripts.training.recorded import RecordedPasses

ROOT = Path(__file__).resolve().parent.parent
HEADS = (
    "model", "pictures in a step", "precision", "operations", "plain step, s", "with a recording", "faster: median (quartiles)", "making and proving it, s",
)  # fmt: skip


@dataclass
class Turns(Listener):
    """Takes the time of every step, and says which way the next one goes.

    Attributes:
        times: wall-clock seconds of the plain steps and of the repeated ones.
        extra: seconds of the passes in which recordings were made and proven.
        repeats: whether the next step is a recorded one.
    """

    times: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    extra: list[float] = field(default_factory=list)
    repeats: bool = True
    passes: RecordedPasses | None = None
    _began: float = 0.0

    def ticked(self, step: int) -> None:
        now = time.perf_counter()
        assert self.passes is not None
        if self.passes.num_proven == 0 or len(self.extra) < 2:
            self.extra = [*self.extra, now - self._began][-2:]
        else:
            self.times[self.repeats].append(now - self._began)
            self.repeats = not self.repeats
        self._began = time.perf_counter()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            ("builtin:mini-sd", 128, batch, precision, options.steps)
            for batch, precision in ((1, "fp32"), (8, "fp32"), (8, "bf16"))
        ]
        if options.full:
            base = make_base(ROOT / "build" / "benchmarks" / "work" / "bases", "sd15")
            cases.append((str(base.file), 512, 1, "bf16", max(options.steps // 3, 8)))
        for case in cases:
            rows.append(row(Path(folder), *case))
            print(" | ".join(rows[-1]), flush=True)
    text = table(HEADS, rows) + f"\n{processor()}, torch {torch.__version__}, threads: {options.threads}.\n"
    if options.update_docs:
        update_docs(text, "recorded_passes")


def row(folder: Path, base: str, size: int, batch: int, precision: str, pairs: int) -> list[str]:
    num_steps = 2 * pairs + 5
    pictures = make_pictures(folder / f"pictures-{size}-{batch}", side=size, batch_size=batch, steps=num_steps)
    values = run_values(pictures.table, base, num_steps) | {
        "resolution": size, "batch_size": batch, "mixed_precision": precision, "log_steps": num_steps, "validation_pictures": 0,
        "max_steps": 1000, "save_steps": 1000, "output_dir": str(folder / f"{Path(base).stem}-{batch}-{precision}"),
    }  # fmt: skip
    turns = Turns()
    with_turns(turns, num_steps, lambda: train_and_report(RunConfig.model_validate(values), more=[turns]))
    assert turns.passes is not None
    plain, recorded = turns.times[False][:pairs], turns.times[True][:pairs]
    ratios = [a / b for a, b in zip(plain, recorded, strict=False)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [
        "SD 1.5, 512 px" if size == 512 else f"{base}, {size} px",
        str(batch),
        precision,
        f"{turns.passes.num_operations:,}",
        f"{statistics.median(plain):.3f}",
        f"{statistics.median(recorded):.3f}",
        f"{middle:.3f} ({low:.3f} to {high:.3f})",
        f"{sum(turns.extra) - 2 * statistics.median(plain):.2f}",
    ]


class _EnoughError(Exception):
    """All steps that are wanted were made."""


def with_turns(turns: Turns, num_steps: int, run: Callable[[], Any]) -> None:
    """The run, up to a step, with passes that go the way that the turns say."""
    original = speed.Speed.training_pass

    def both(self: speed.Speed, *args: Any) -> Any:
        plain = original(replace(self, recorded=False), *args)
        turns.passes = original(replace(self, recorded=True), *args)  # type: ignore[assignment]
        steps = 0

        class Either:
            def __call__(self, batch: Batch) -> Loss:
                nonlocal steps
                steps += 1
                if steps > num_steps:
                    raise _EnoughError
                assert turns.passes is not None
                return (turns.passes if turns.repeats else plain)(batch)

            def forget(self) -> None:
                return None

        return Either()

    speed.Speed.training_pass = both  # type: ignore[method-assign]
    try:
        run()
    except _EnoughError:
        pass
    finally:
        speed.Speed.training_pass = original  # type: ignore[method-assign]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="of each kind")
    parser.add_argument("--full", action="store_true", help="Stable Diffusion 1.5 too")
    parser.add_argument("--update-docs", action="store_true", help="put the table into docs/benchmarks.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
