"""Whether two LoRAs work at once, and whether going on from an older LoRA saves steps; by judges that training never sees.

    python benchmarks/combine_and_continue.py [--pairs "ink wash:11" watercolour:12] [--seeds 31 32] [--update-docs]

Combined: a LoRA of a style and one of a character are trained each on its own, then rendered alone and together at 0.7 each,
with the same prompts and seeds. The character is a purple elephant that captions call "momo", a word that the base model does
not know; a style judge reads the style, another network with heads of its own the subject and its colour.

Continued: the older LoRA is finished, trained on half of the pictures for as many steps as the run from scratch on all of
them. The run that goes on from it has 60 % of those steps on all pictures, its schedule ending there. Beside it a run from
scratch of the same 60 %: what that reaches too was not saved by going on.

Whatever is finished is kept under --out, so the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from style_vs_diffusers import keep_setup
from suite import DOCS, ROOT  # which makes src importable
from suite.lora_study import COLOUR, CONDITIONS, NAME, SCRATCH_STEPS, SHORT_STEPS, SUBJECT, Reading, tables
from suite.machine import processor
from suite.telling import update_docs

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.builtin.world import Scene

NUM_PICTURES = 24
COMBINED_STEPS, COMBINED_BATCH = 400, 8
"""Of the two LoRAs that are combined: as in the demo."""
SAVE_STEPS, BATCH = 96, 4
"""Of the runs that are compared: the one that goes on is saved at 30 and 60 % of the steps from scratch."""
HALF_RATE = 5e-4
GOING_ON = {
    "batch_size": BATCH,
    "save_steps": SAVE_STEPS,
    "lora_rank": 8,
    "learning_rate": 2 * HALF_RATE,
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
}
"""As in `style_vs_diffusers.py`. The demo's rank, rate and layers take the style near to its ceiling in 60 % of the steps
from scratch, and leave little to save."""
CONTINUED_SAVES = range(SAVE_STEPS, SHORT_STEPS + 1, SAVE_STEPS)
PAIRS = [("ink wash", 11), ("watercolour", 12), ("pixel art", 13)]
"""Styles in which a purple elephant is still purple; a blueprint or a woodcut has no colour of its own."""
SEEDS = [31, 32, 33, 34]
QUICK = 10
"""Denoising steps where every saved step is rendered; elsewhere 20."""


def main() -> None:
    options = parse_options()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    setup = describe(options)
    keep_setup(out / "setup.json", setup)
    combined = {
        (style, seed): combine(out / f"combined-{style.replace(' ', '_')}-{seed}", style, seed, options)
        for style, seed in options.pairs
    }
    continued = {seed: go_on(out / f"continued-{seed}", seed, options) for seed in options.seeds}
    text = tables(setup, combined, continued)
    (out / "results.md").write_text(text, "utf-8")
    print(f"{text}\n{out / 'results.md'}")
    if options.update_docs:
        update_docs(text, "combine_and_continue")


def parse_options() -> argparse.Namespace:
    from lora_scripts.builtin.world import STYLES

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    def pair(text: str) -> tuple[str, int]:
        style, _, seed = text.partition(":")
        if style not in STYLES or not seed.isdecimal():
            raise argparse.ArgumentTypeError(f"{text}: write STYLE:SEED; styles: {', '.join(STYLES)}")
        return style, int(seed)

    parser.add_argument("--pairs", nargs="*", type=pair, default=PAIRS, help="STYLE:SEED of the LoRAs to combine")
    parser.add_argument("--style", default="ink wash", choices=STYLES, help="of the runs that go on")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS, help="of their pictures, training and prompts")
    parser.add_argument("--prompts", type=int, default=48, help="pictures rendered and read per saved step")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "combine_and_continue")
    parser.add_argument("--update-docs", action="store_true", help=f"put the tables into {DOCS.relative_to(ROOT)}")
    return parser.parse_args()


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What shapes the figures, the seed apart."""
    return {
        "style": options.style,
        "prompts": options.prompts,
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }


# Two LoRAs at once ----------------------------------------------------------------------------------------------------


def combine(folder: Path, style: str, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Condition -> what the judges read, after training both LoRAs; an earlier result is taken as it is."""
    kept = folder / "result.json"
    if not kept.is_file():
        draw_pictures(folder / "style", seed, style=style)
        draw_pictures(folder / "character", seed + 500)
        files = [
            train(folder, name, folder / name, seed, COMBINED_STEPS, options, trigger=trigger)
            for name, trigger in (("style", style), ("character", NAME))
        ]
        kept.write_text(json.dumps(measure_combined(folder, files, style, seed, options), indent=1) + "\n", "utf-8")
    result: dict[str, dict[str, float]] = json.loads(kept.read_text("utf-8"))
    return result


def measure_combined(
    folder: Path, files: Sequence[Path], style: str, seed: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    from lora_scripts.builtin.judges import load_judges
    from lora_scripts.builtin.world import PLACES, TIMES

    prompts = [f"{style}, {NAME} {where(place)} {when(time)}" for place in PLACES for time in TIMES]
    judges, results, rows = load_judges(), {}, {}
    for title, weights in CONDITIONS.items():
        images = rendered(prompts, list(zip(files, weights, strict=True)), seed, options)
        looks, read = judges.style_probabilities(images), judges.read_attributes(images)
        styled = [max(look, key=look.__getitem__) == style for look in looks]
        known = [each["subject"] == SUBJECT and each["colour"] == COLOUR for each in read]
        results[title] = {
            "style": statistics.fmean(styled),
            "style probability": statistics.fmean(look[style] for look in looks),
            "subject": statistics.fmean(each["subject"] == SUBJECT for each in read),
            "character": statistics.fmean(known),
            "both": statistics.fmean(a and b for a, b in zip(styled, known, strict=True)),
        }
        rows[title] = images[::4]
    sheet(rows).save(folder / "grid.png")
    return results


def where(place: str) -> str:
    return {"beach": "on the beach", "lake": "by the lake"}.get(place, f"in the {place}")


def when(time: str) -> str:
    return {"day": "in daylight", "sunset": "at sunset", "night": "at night", "rain": "in the rain"}[time]


# Going on from an older LoRA ------------------------------------------------------------------------------------------


def go_on(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, Reading]]:
    """Run -> saved step -> what the judges read; an earlier result is taken as it is."""
    kept = folder / "result.json"
    if not kept.is_file():
        draw_pictures(folder / "all", seed, style=options.style)
        first_half(folder / "all", folder / "half")
        # Every run has the same settings but for these.
        older = folder / "older" / "older.safetensors"
        runs: dict[str, tuple[str, int, Sequence[int], dict[str, Any]]] = {
            "older": ("half", SCRATCH_STEPS, [SCRATCH_STEPS], {}),
            "scratch": ("all", SCRATCH_STEPS, [SCRATCH_STEPS], {}),
            "short": ("all", SHORT_STEPS, [SHORT_STEPS], {}),
            "continued": ("all", SHORT_STEPS, CONTINUED_SAVES, {"init_lora_weights": str(older)}),
            "gently": (
                "all",
                SHORT_STEPS,
                [SHORT_STEPS],
                {"init_lora_weights": str(older), "learning_rate": HALF_RATE},
            ),
        }
        curves: dict[str, dict[str, Reading]] = {}
        for name, (pictures, steps, saves, more) in runs.items():
            part = folder / f"{name}.json"
            if not part.is_file():
                train(folder, name, folder / pictures, seed, steps, options, trigger=options.style, **(GOING_ON | more))
                readings = {}
                for step in saves:
                    file = folder / name / f"checkpoint-{step}" / f"{name}-{step}.safetensors"
                    readings[str(step)], images = judged(file, seed, options)
                sheet({f"{name}, step {steps}": images[:8]}).save(folder / f"{name}.png")
                part.write_text(json.dumps(readings) + "\n", "utf-8")
            curves[name] = json.loads(part.read_text("utf-8"))
        kept.write_text(json.dumps(curves) + "\n", "utf-8")
    result: dict[str, dict[str, Reading]] = json.loads(kept.read_text("utf-8"))
    return result


def first_half(pictures: Path, folder: Path) -> None:
    """The first half of a folder's pictures with their captions, in a folder of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = list(csv.reader((pictures / "metadata.csv").open(encoding="utf-8")))[1 : 1 + NUM_PICTURES // 2]
    for name, _ in rows:
        shutil.copy(pictures / name, folder / name)
    write_captions(folder, rows)


def judged(file: Path, seed: int, options: argparse.Namespace) -> tuple[Reading, list[Image]]:
    """What the judges read in pictures of scenes that were not trained, and the pictures."""
    import numpy as np

    from lora_scripts.builtin.judges import load_judges
    from lora_scripts.builtin.world import caption, random_scene

    rng = np.random.default_rng(seed + 1_000_003)
    scenes = [random_scene(rng) for _ in range(options.prompts)]
    prompts = [f"{options.style}, {caption(scene, rng)}" for scene in scenes]
    images = rendered(prompts, [(file, 1.0)], seed, options, QUICK)
    judges = load_judges()
    reading = {
        "style": [look[options.style] for look in judges.style_probabilities(images)],
        "attributes": [
            statistics.fmean(read[kind] == getattr(scene, kind) for kind in read)
            for read, scene in zip(judges.read_attributes(images), scenes, strict=True)
        ],
    }
    return reading, images


# Pictures, training, rendering ----------------------------------------------------------------------------------------


def draw_pictures(folder: Path, seed: int, style: str | None = None) -> None:
    """Fills the folder with pictures of random scenes in a style, or of the character in the base model's own look."""
    import numpy as np

    from lora_scripts.builtin.world import COUNTS, PLACES, TIMES, Scene, canonical_caption, draw, random_scene

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(NUM_PICTURES):
        scene: Scene = random_scene(rng)
        if style is None:
            scene = Scene(SUBJECT, COLOUR, str(rng.choice(PLACES)), str(rng.choice(TIMES)), COUNTS[0])
        text = canonical_caption(scene) if style else f"{NAME} {where(scene.place)} {when(scene.time)}"
        draw(scene, seed=seed * 1000 + number, style=style).save(folder / f"{number + 1:02d}.png")
        rows.append([f"{number + 1:02d}.png", text])
    write_captions(folder, rows)


def write_captions(folder: Path, rows: Sequence[Sequence[str]]) -> None:
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("filename", "prompt"), *rows])


def train(
    folder: Path,
    name: str,
    pictures: Path,
    seed: int,
    steps: int,
    options: argparse.Namespace,
    *,
    trigger: str,
    **more: Any,
) -> Path:
    """The finished file of a run with the demo's settings but for `more`, trained in a process of its own as a user does."""
    import yaml

    from lora_scripts.demo import demo_config

    values = demo_config(folder, trigger, seed).model_dump(mode="json", exclude_unset=True)
    values |= {
        "train_data_dir": str(pictures),
        "metadata_path": str(pictures / "metadata.csv"),
        "trigger_word": trigger,
        "output_name": name,
        "output_dir": str(folder / name),
        "max_steps": steps,
        "save_steps": steps,
        "batch_size": COMBINED_BATCH,
        "validation_pictures": 0,
        "keep": "last",
        "sample_every": 0,
    }
    for previews in ("sample_prompts", "sample_guidance"):
        values.pop(previews, None)
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(values | more, sort_keys=False), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-m", "lora_scripts", "train", "--config", str(config), "--force"]
    print(f"{folder.name}/{name}: training {steps} steps ...", flush=True)
    log = folder / f"{name}.txt"
    with log.open("wb") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}; the end of {log}:\n{log.read_text('utf-8')[-3000:]}")
    return folder / name / f"{name}.safetensors"


def rendered(
    prompts: Sequence[str], files: Sequence[tuple[Path, float]], seed: int, options: argparse.Namespace, steps: int = 20
) -> list[Image]:
    """The prompts with these LoRAs at their weights, as `<lora:A:0.7> <lora:B:0.7>` puts them to work."""
    import torch

    from lora_scripts.demo import BASE_MODEL, GUIDANCE
    from lora_scripts.export.names import layer_shapes
    from lora_scripts.export.reader import read_lora_file
    from lora_scripts.families.protocol import SampleRequest
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.models.stable_diffusion import load_stable_diffusion
    from lora_scripts.sampling.denoise import render
    from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA

    torch.set_num_threads(options.threads)
    requests = [
        SampleRequest(prompt, seed=seed * 1000 + n, steps=steps, guidance=GUIDANCE, width=128, height=128)
        for n, prompt in enumerate(prompts)
    ]
    device = torch.device("cpu")
    parts = load_stable_diffusion(resolve_base_model(BASE_MODEL), device, torch.float32)
    components = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    shapes = layer_shapes(components)
    loras = [WeightedLoRA(read_lora_file(file, shapes).weights, weight, weight) for file, weight in files if weight]
    with torch.no_grad(), LoRASet(components, loras):
        return render(parts, requests, device, batch_size=16)


def sheet(rows: Mapping[str, Sequence[Image]]) -> Image:
    """One row of pictures per title."""
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    side, gap, left = 128, 6, 190
    most = max(len(images) for images in rows.values())
    page = PILImage.new("RGB", (left + most * (side + gap), len(rows) * (side + gap) + gap), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for row, (title, images) in enumerate(rows.items()):
        top = gap + row * (side + gap)
        pen.text((left - gap, top + side // 2), title, "black", font, anchor="rm")
        for column, image in enumerate(images):
            page.paste(image, (left + column * (side + gap), top))
    return page


# Telling --------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    main()
