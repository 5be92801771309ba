"""Seconds from `python train.py` to the end of the first optimizer step, with an empty cache and with a full one.

    python benchmarks/first_step.py [--runs 5] [--full-size]

The clock starts before the process does and stops when the step's line is in the run's record, so everything counts: the
interpreter, imports, reading weights, encoding, the step. `--full-size` takes Stable Diffusion 1.5's architecture with
random weights as one file (1.7 GB, made on the spot) at 512 px instead of the built-in model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="with a full cache, after one with an empty one")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--full-size", action="store_true", help="Stable Diffusion 1.5's size, random weights")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = 512 if options.full_size else 128
        draw_pictures(folder / "pictures", options.pictures, size)
        base = "builtin:mini-sd"
        if options.full_size:
            from helpers.full_size import write_full_size

            base = str(folder / "sd15.safetensors")
            write_full_size(Path(base), "sd15")
        settings = {
            "train_data_dir": folder / "pictures",
            "base_model": base,
            "output_dir": folder / "run",
            "batch_size": 1 if options.full_size else 8,
            "max_steps": 1000,
            "log_steps": 1,
            "sample_every": 0,
        }
        config = folder / "config.yaml"
        config.write_text("".join(f"{key}: {json.dumps(str(value))}\n" for key, value in settings.items()), "utf-8")
        cold = seconds_to_first_step(config, folder / "run")
        warm = [seconds_to_first_step(config, folder / "run") for _ in range(options.runs)]
    print(f"{base if not options.full_size else 'Stable Diffusion 1.5 (random weights)'}, {options.pictures} pictures")
    print(f"empty cache: {cold:.1f} s")
    print(
        f"full cache:  median {statistics.median(warm):.1f} s, {min(warm):.1f} to {max(warm):.1f} in {len(warm)} runs"
    )


def draw_pictures(folder: Path, count: int, size: int) -> None:
    import numpy as np

    from lora_scripts.builtin.world import canonical_caption, draw, random_scene

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        scene = random_scene(rng)
        draw(scene, number, size=size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(canonical_caption(scene), "utf-8")


def seconds_to_first_step(config: Path, run: Path) -> float:
    """From the start of the process until its record holds a step; the process is then ended."""
    shutil.rmtree(run, ignore_errors=True)
    record = run / "record.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not (record.exists() and '"event": "stepped"' in record.read_text("utf-8", errors="replace")):
            if process.poll() is not None:
                assert process.stdout is not None
                sys.exit(f"the run ended before its first step:\n{process.stdout.read()}")
            time.sleep(0.02)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
