"""Losses of one run with each setting of speed, beside those of the plain run in float32: equal, or the difference.

    python benchmarks/loss_curves.py [--steps 30] [--skip compile] [--update-docs]

Pictures of the built-in world on `builtin:mini-sd`, and generated dialogues on a Llama of random weights, on this machine's
processor. It measures what a setting does to the losses; what it does to the speed is not measured here. Products in 8 bits are
made in all layers, however small, and passes are recorded in runs however short: a run leaves alone what gains nothing by it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from style_vs_diffusers import DOCS, ROOT, processor, update_docs  # which makes src importable
from text_materials import make_materials

from lora_scripts import speeding
from lora_scripts.builtin.world import canonical_caption, draw, random_scene
from lora_scripts.config import RunConfig
from lora_scripts.models import low_bit_layers
from lora_scripts.train_command import train_and_report
from lora_scripts.training.events import Listener, StepReport

PICTURES, TEXT = "builtin:mini-sd, 128 px", "a Llama of 4 layers"
OPTIONS: dict[str, list[dict[str, Any]]] = {
    PICTURES: [
        {"record_passes": True},
        {"fuse_layers": False},
        {"cuda_graphs": True},
        {"block_swap": 3},
        {"gradient_checkpointing": True},
        {"compile": True},
        {"low_bit_matmul": "int8"},
        {"low_bit_matmul": "fp8"},
        {"mixed_precision": "bf16"},
    ],
    TEXT: [
        {"block_swap": 2},
        {"gradient_checkpointing": True},
        {"compile": True},
        {"low_bit_matmul": "int8"},
        {"low_bit_matmul": "fp8"},
        {"mixed_precision": "bf16"},
    ],
}
"""Beside the plain run; the last is no setting of speed alone but gives the measure: what rounding to half precision does."""


class Losses(Listener):
    """Keeps every step's loss, and what a run says about the setting."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.warnings: list[str] = []

    def stepped(self, report: StepReport) -> None:
        self.values += report.losses

    def note(self, text: str, level: str = "info") -> None:
        if level == "warning":
            self.warnings.append(text)


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    low_bit_layers.LEAST_WEIGHTS = 0
    speeding.WORTH_RECORDING = 0
    lines = [
        "| model | setting | largest difference of a step's loss | mean | first and last loss, plain | with the setting |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for title, common in (
            (PICTURES, pictures_run(Path(folder), options.steps)),
            (TEXT, text_run(Path(folder), options.steps)),
        ):
            plain = losses_of(common, Path(folder) / "plain")
            for changes in OPTIONS[title]:
                name = ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
                if not options.skip.intersection(changes):
                    found = losses_of(common | changes, Path(folder) / "with")
                    lines.append(row(title, name, plain, found))
                    print(lines[-1], flush=True)
    lines += ["", f"{options.steps} steps. {processor()}, torch {torch.__version__}, threads: {options.threads}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.update_docs:
        update_docs(text, "loss_curves")


def losses_of(values: dict[str, Any], output_dir: Path) -> Losses:
    """Of a fresh run; its folder is removed at the end with all the others."""
    losses = Losses()
    number = len(list(output_dir.parent.glob(f"{output_dir.name}-*")))
    values = values | {"output_dir": str(output_dir.with_name(f"{output_dir.name}-{number}"))}
    train_and_report(RunConfig.model_validate(values), more=[losses])
    return losses


def row(title: str, setting: str, plain: Losses, found: Losses) -> str:
    """One line of the table; a setting that could not be had is said rather than shown as equal."""
    refused = [text for text in found.warnings if text.startswith(setting.split(":")[0])]
    if refused:
        return f"| {title} | `{setting}` | {refused[0]} | | | |"
    pairs = list(zip(plain.values, found.values, strict=True))
    differences = [abs(b - a) / abs(a) for a, b in pairs]
    ends = [f"{values[0]:.6g}, {values[-1]:.6g}" for values in (plain.values, found.values)]
    return (
        f"| {title} | `{setting}` | {shown(max(differences))} | {shown(statistics.fmean(differences))} "
        f"| {ends[0]} | {ends[1]} |"
    )


def shown(difference: float) -> str:
    return "none" if difference == 0 else f"{difference:.1e}"


def pictures_run(folder: Path, steps: int) -> dict[str, Any]:
    """Settings of a run on two shapes of pictures."""
    data = folder / "pictures"
    data.mkdir()
    rng = np.random.default_rng(0)
    with (data / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "prompt"])
        for number in range(16):
            scene = random_scene(rng)
            image = draw(scene, number, size=128)
            if number % 3 == 0:
                image = image.crop((0, 16, 128, 112))
            image.save(data / f"{number:02d}.png")
            rows.writerow([f"{number:02d}.png", canonical_caption(scene)])
    values = run_values(data, "builtin:mini-sd", steps)
    return values | {"resolution": 128, "record_passes": False, "validation_pictures": 0}


def text_run(folder: Path, steps: int) -> dict[str, Any]:
    """Settings of a run on dialogues of different lengths."""
    make_materials(folder / "text", "tiny", rows=64, rank=8, seed=0)
    values = run_values(folder / "text" / "data", str(folder / "text" / "model"), steps)
    return values | {"task_type": "text-generation", "validation_dialogues": 0}


def run_values(data: Path, model: str, steps: int) -> dict[str, Any]:
    return {
        "train_data_dir": str(data), "base_model": model, "max_steps": steps, "save_steps": steps, "batch_size": 4,
        "log_steps": 1, "learning_rate": 1e-3, "mixed_precision": "fp32", "sample_every": 0, "keep": "last", "device": "cpu",
    }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--skip", nargs="*", default=[], help="settings to leave out: compile takes many minutes on a busy processor"
    )
    parser.add_argument("--update-docs", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    options = parser.parse_args()
    options.skip = set(options.skip)
    return options


if __name__ == "__main__":
    main()
