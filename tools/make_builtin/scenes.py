"""Renders scenes once into memory-mapped arrays, and hands them to the trainings.

A set is a folder `data/NAME/` under the work folder:

    images.npy      [N,128,128,3] uint8
    masks.npy       [N,128,128] uint8, 255 where the subject is
    attributes.npy  [N,5] int8, indices into ATTRIBUTES[kind], kinds in KINDS order
    styles.npy      [N] int8, 0 = plain look, 1.. = index into STYLES plus one
    done.txt        how many pictures are finished: a training may start on the first part
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lora_scripts.builtin import world

KINDS: tuple[str, ...] = tuple(world.ATTRIBUTES)
LOOKS: tuple[str, ...] = ("plain", *world.STYLES)
SIZE = 128
DEFAULT_WORK = Path(__file__).resolve().parents[2] / "build" / "builtin"

SETS: dict[str, tuple[int, str, bool]] = {
    # name: first seed, split, styled
    "base": (0, "train", False),
    "styled": (10_000_000, "train", True),
    "rare": (60_000_000, "held_out", False),  # for the judges alone, which must know every combination
    "rare_styled": (70_000_000, "held_out", True),
    "base_test": (20_000_000, "held_out", False),
    "styled_test": (30_000_000, "held_out", True),
}
"""Seeds never overlap, so no picture of a test set was ever trained on."""


@dataclass
class SceneSet:
    """The finished part of a rendered set; arrays are memory-mapped and read only."""

    images: np.ndarray
    masks: np.ndarray
    attributes: np.ndarray
    styles: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def scene(self, index: int) -> world.Scene:
        """The scene that picture `index` shows."""
        row = self.attributes[index]
        return world.Scene(**{kind: world.ATTRIBUTES[kind][row[k]] for k, kind in enumerate(KINDS)})


def attribute_indices(scene: world.Scene) -> list[int]:
    """[5] indices of the scene's values, kinds in KINDS order."""
    return [world.ATTRIBUTES[kind].index(getattr(scene, kind)) for kind in KINDS]


def open_set(work: Path, name: str, wait_for: int = 1) -> SceneSet:
    """The finished part of a set, waiting until it holds at least `wait_for` pictures."""
    folder = work / "data" / name
    while True:
        done = int((folder / "done.txt").read_text() or 0) if (folder / "done.txt").exists() else 0
        if done >= wait_for:
            break
        time.sleep(2)
    arrays = {
        n: np.load(folder / f"{n}.npy", mmap_mode="r")[:done] for n in ("images", "masks", "attributes", "styles")
    }
    return SceneSet(**arrays)


def render(work: Path, name: str, count: int) -> None:
    """Writes set `name` with `count` pictures, continuing where an earlier run stopped."""
    first_seed, split, styled = SETS[name]
    folder = work / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    done_file = folder / "done.txt"
    done = int(done_file.read_text()) if done_file.exists() else 0
    shapes = {
        "images": ((count, SIZE, SIZE, 3), np.uint8),
        "masks": ((count, SIZE, SIZE), np.uint8),
        "attributes": ((count, len(KINDS)), np.int8),
        "styles": ((count,), np.int8),
    }
    mode = "r+" if done else "w+"
    arrays = {n: open_memmap(folder / f"{n}.npy", mode=mode, dtype=d, shape=s) for n, (s, d) in shapes.items()}
    start = time.time()
    for i in range(done, count):
        rng = np.random.default_rng(first_seed + i)
        scene = world.random_scene(rng, split=split)
        look = 1 + i % len(world.STYLES) if styled else 0
        picture, mask = world.draw_with_mask(scene, first_seed + i, style=LOOKS[look] if look else None, size=SIZE)
        arrays["images"][i] = np.asarray(picture)
        arrays["masks"][i] = np.asarray(mask)
        arrays["attributes"][i] = attribute_indices(scene)
        arrays["styles"][i] = look
        if (i + 1) % 250 == 0 or i + 1 == count:
            temporary = folder / "done.tmp"
            temporary.write_text(str(i + 1))
            os.replace(temporary, done_file)
            print(f"{name} {i + 1}/{count} {(i + 1 - done) / (time.time() - start):.1f}/s", flush=True)


def main() -> None:
    """Reads the command line and renders the sets asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument(
        "--sets", default="base_test=600,styled_test=300,styled=3600,base=14000,rare=2000,rare_styled=1200"
    )
    arguments = parser.parse_args()
    for part in arguments.sets.split(","):
        name, count = part.split("=")
        render(arguments.work, name, int(count))


if __name__ == "__main__":
    main()
