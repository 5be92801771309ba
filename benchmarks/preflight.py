"""Seconds that the checks of pictures and captions take, with an empty cache and with a full one.

    python benchmarks/preflight.py [--pictures 1000] [--side 1024] [--threads 2]

Half of the pictures are JPEG, half PNG, as noisy as photographs, so that decoding them takes as long. The model step is
left out: how long it takes depends on the model alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

if TYPE_CHECKING:
    from lora_scripts.preflight.findings import Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--threads", type=int, default=2, help="that decode and measure")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with ThreadPoolExecutor(options.threads) as pool:
            sizes = list(pool.map(lambda number: draw(folder, number, options.side), range(options.pictures)))
        print(f"{options.pictures} pictures of {options.side}x{options.side}, {sum(sizes) / 1e6:.0f} MB")
        for cache in ("empty", "full"):
            began = time.perf_counter()
            listed, report = check(folder, options.side, options.threads)
            seconds = time.perf_counter() - began
            print(f"{cache} cache: {seconds:.1f} s, of which listing and hashing the files {listed:.1f} s")
        print(f"findings: {', '.join(finding.code for finding in report.findings) or 'none'}")


def draw(folder: Path, number: int, side: int) -> int:
    """One picture with its caption: soft shapes of all sizes with grain; its bytes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(number)
    image = Image.new("RGB", (side, side), "grey")
    for cells in (4, 16, 64, 256):
        layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, layer.resize((side, side), Image.Resampling.BILINEAR), 0.4)
    grain = Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).convert("RGB")
    image = Image.blend(image, grain, 0.04)
    path = folder / f"{number:04d}.{'jpg' if number % 2 else 'png'}"
    if number % 2:
        image.save(path, quality=92)
    else:
        image.save(path, compress_level=1)
    path.with_suffix(".txt").write_text(f"clouds number {number}, seen from the {'north' if number % 3 else 'south'}")
    return path.stat().st_size


def check(folder: Path, side: int, threads: int) -> tuple[float, Report]:
    """Seconds until the files are listed, and the report."""
    from lora_scripts.config import RunConfig
    from lora_scripts.data.cache import EncodingCache, cache_folder
    from lora_scripts.data.dataset import open_dataset
    from lora_scripts.preflight.run import check_data

    config = RunConfig(
        train_data_dir=folder, base_model="-", output_dir=folder / "run", resolution=(side, side), num_workers=threads
    )
    began = time.perf_counter()
    dataset = open_dataset(config, (side, side))
    listed = time.perf_counter() - began
    return listed, check_data(config, dataset, EncodingCache(cache_folder(config)))


if __name__ == "__main__":
    main()
