"""How well a style is learnt, beside the LoRA script of diffusers: same pictures, captions, base, rank, rate and steps.

    python benchmarks/style_vs_diffusers.py --script train_text_to_image_lora.py [--python PYTHON] [--update-docs]

For every style and seed both sides train on the same folder, each as a process of its own, in turns. Both files are then
rendered by our sampler with the same prompts and seeds, and the judges that no training sees read the pictures, those of
the bare base model too. The example script comes from diffusers' `examples/text_to_image`; PYTHON runs it and needs the
package `datasets`. Whatever is finished is kept under --out, so the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from suite import DOCS, ROOT, STAND_INS  # which makes src importable
from suite.machine import processor
from suite.telling import percent, update_docs

RUN_EXAMPLE = STAND_INS / "run_example.py"
BASE_MODEL = "builtin:mini-sd"
NUM_PICTURES = 24
SIDE = 128
SIDES = ("ours", "diffusers")

Training = dict[str, float]
"""Of one run: wall_s and cpu_s of the whole process, steps_per_s without start-up and end, loss over the last third."""


def main() -> None:
    options = parse_options()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    setup = describe(options)
    keep_setup(out / "setup.json", setup)
    pairs = []
    for number, (style, seed) in enumerate((style, seed) for style in options.style for seed in options.seed):
        folder = out / f"{style.replace(' ', '_')}-{seed}"
        draw_pictures(folder / "pictures", style, seed)
        trainings = {side: train(side, folder, style, seed, options) for side in turns(number)}
        readings = measure(folder, style, seed, options)
        pairs.append({"style": style, "seed": seed, "training": trainings, "readings": readings})
        print(f"{style}, seed {seed}: " + ", ".join(f"{who} {percent(r['style'])}" for who, r in readings.items()))
    (out / "results.json").write_text(json.dumps({"setup": setup, "pairs": pairs}, indent=1) + "\n", "utf-8")
    text = tables(setup, pairs)
    (out / "results.md").write_text(text, "utf-8")
    print(f"\n{text}\n{out / 'results.json'}")
    if options.update_docs:
        update_docs(text, "style_vs_diffusers")


def parse_options() -> argparse.Namespace:
    from lora_scripts.builtin.world import STYLES

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--script", type=Path, required=True, help="diffusers' train_text_to_image_lora.py")
    parser.add_argument("--python", default=sys.executable, help="runs the script; must have the package datasets")
    parser.add_argument("--style", nargs="+", default=["ink wash", "blueprint", "watercolour"], choices=STYLES)
    parser.add_argument("--seed", nargs="+", type=int, default=[42], help="of pictures, training and prompts")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr-scheduler", default="cosine", choices=["constant", "constant_with_warmup", "cosine"])
    parser.add_argument("--prompts", type=int, default=48, help="pictures rendered and read per file")
    parser.add_argument("--render-steps", type=int, default=20, help="denoising steps of a rendered picture")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each process")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "style_vs_diffusers")
    parser.add_argument("--update-docs", action="store_true", help=f"put the tables into {DOCS.relative_to(ROOT)}")
    options = parser.parse_args()
    if not options.script.is_file():
        parser.error(f"--script {options.script}: no such file")
    if options.steps < 3:
        parser.error("--steps: at least 3")
    return options


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that shapes the figures, style and seed apart."""
    from lora_scripts.builtin.weights import builtin_path

    shaping = ("steps", "rank", "learning_rate", "batch_size", "lr_scheduler", "prompts", "render_steps")
    base = hashlib.sha256()
    for file in sorted(builtin_path(BASE_MODEL).rglob("*.safetensors")):
        base.update(file.read_bytes())
    return {
        **{name: getattr(options, name) for name in (*shaping, "device", "threads")},
        "warmup_steps": warmup_steps(options),
        "base_sha256": base.hexdigest(),
        "script_sha256": hashlib.sha256(options.script.read_bytes()).hexdigest(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "transformers", "accelerate")},
        "machine": f"{processor()}, {os.cpu_count()} cores" if options.device == "cpu" else "CUDA GPU",
    }


def keep_setup(file: Path, setup: Mapping[str, Any]) -> None:
    """Figures of two different set-ups must not end up in one table."""
    if file.is_file():
        before = json.loads(file.read_text("utf-8"))
        differing = [name for name in {*before, *setup} if before.get(name) != setup.get(name)]
        if differing:
            sys.exit(f"{file.parent}: holds results with other {', '.join(sorted(differing))}. Name another --out.")
    file.write_text(json.dumps(setup, indent=1) + "\n", "utf-8")


def turns(number: int) -> Sequence[str]:
    """Who trains first changes from pair to pair, so that a machine that slows down treats both alike."""
    return SIDES if number % 2 == 0 else SIDES[::-1]


def warmup_steps(options: argparse.Namespace) -> int:
    return 0 if options.lr_scheduler == "constant" else max(1, options.steps // 20)


def draw_pictures(folder: Path, style: str, seed: int) -> None:
    """Fills the folder with pictures of one style and a table of captions that both sides read as it is."""
    import numpy as np

    from lora_scripts.builtin.world import canonical_caption, draw, random_scene

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(NUM_PICTURES):
        scene = random_scene(rng)
        name = f"{number + 1:02d}.png"
        draw(scene, seed=seed * 1000 + number, style=style, size=SIDE).save(folder / name)
        rows.append((name, f"{style}, {canonical_caption(scene)}"))
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])


# Training -------------------------------------------------------------------------------------------------------------


def train(side: str, folder: Path, style: str, seed: int, options: argparse.Namespace) -> Training:
    """Trains in a process of its own; an earlier result of the same set-up is taken as it is."""
    kept = folder / f"{side}.json"
    if kept.is_file():
        return json.loads(kept.read_text("utf-8"))  # type: ignore[no-any-return]
    work = folder / side
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = our_command if side == "ours" else example_command
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HOME": str(work / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ACCELERATE_USE_CPU": "true" if options.device == "cpu" else "false",
    }
    print(f"{style}, seed {seed}: training, {side} ...", flush=True)
    log = work / "output.txt"
    began, cpu_before = time.perf_counter(), children_cpu_s()
    with log.open("wb") as file:
        done = subprocess.run(
            command(folder, work, style, seed, options), env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    wall_s, cpu_s = time.perf_counter() - began, children_cpu_s() - cpu_before
    if done.returncode:
        sys.exit(f"{side}: exit code {done.returncode}; the end of {log}:\n{log.read_text('utf-8', 'replace')[-3000:]}")
    losses, seconds = our_curve(work) if side == "ours" else example_curve(work)
    assert len(losses) == options.steps, f"{side}: {len(losses)} losses for {options.steps} steps"
    first, last = report_every(options), options.steps
    result = {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "steps_per_s": (last - first) / (seconds[last] - seconds[first]),
        "loss": statistics.fmean(losses[-(len(losses) // 3) :]),
    }
    kept.write_text(json.dumps(result) + "\n", "utf-8")
    return result


def children_cpu_s() -> float:
    spent = os.times()
    return spent.children_user + spent.children_system


def report_every(options: argparse.Namespace) -> int:
    """Our log interval; the speed of both sides is taken from this step to the last one."""
    return max(1, min(10, options.steps // 3))


def our_command(folder: Path, work: Path, style: str, seed: int, options: argparse.Namespace) -> list[str]:
    import yaml

    settings = {
        "train_data_dir": str(folder / "pictures"),
        "cache_dir": str(work / "cache"),
        "resolution": SIDE,
        "trigger_word": style,
        "base_model": BASE_MODEL,
        "device": options.device,
        "mixed_precision": "fp32",
        "lora_rank": options.rank,
        "lora_alpha": float(options.rank),
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "batch_size": options.batch_size,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "lr_scheduler": options.lr_scheduler,
        "warmup_steps": warmup_steps(options),
        "max_grad_norm": 0,
        "validation_pictures": 0,  # all pictures train, as on the other side
        "gradient_checkpointing": False,
        "seed": seed,
        "output_dir": str(work / "run"),
        "output_name": "lora",
        "save_steps": options.steps,
        "save_precision": "fp32",
        "sample_every": 0,
        "log_steps": report_every(options),
    }
    config = work / "config.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    return [sys.executable, "-m", "lora_scripts", "train", "--config", str(config)]


def example_command(folder: Path, work: Path, style: str, seed: int, options: argparse.Namespace) -> list[str]:
    from lora_scripts.builtin.weights import builtin_path

    arguments = {
        "pretrained_model_name_or_path": builtin_path(BASE_MODEL),
        "train_data_dir": folder / "pictures",
        "cache_dir": work / "cache",
        "image_column": "image",
        "caption_column": "text",
        "resolution": SIDE,
        "mixed_precision": "no",
        "rank": options.rank,
        "train_batch_size": options.batch_size,
        "max_train_steps": options.steps,
        "learning_rate": options.learning_rate,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "adam_weight_decay": 0.01,
        "lr_scheduler": options.lr_scheduler,
        "lr_warmup_steps": warmup_steps(options),
        # The script clips nothing whatever is said here: the optimizer has used up the iterator that it clips.
        "max_grad_norm": 1e9,
        "seed": seed,
        "output_dir": work / "run",
        "checkpointing_steps": options.steps + 1,
        "report_to": "tensorboard",
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return [options.python, str(RUN_EXAMPLE), str(options.script.resolve()), *words]


def our_curve(work: Path) -> tuple[list[float], dict[int, float]]:
    """Every step's loss, and the clock at the steps that were reported."""
    entries = [json.loads(line) for line in (work / "run" / "record.jsonl").read_text("utf-8").splitlines()]
    reports = [entry for entry in entries if entry["event"] == "stepped"]
    losses = [loss for report in reports for loss in report["losses"]]
    return losses, {int(report["step"]): float(report["seconds"]) for report in reports}


def example_curve(work: Path) -> tuple[list[float], dict[int, float]]:
    """Every step's loss, and the clock at every step, from the TensorBoard file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in (work / "run" / "logs").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if "train_loss" in events.Tags()["scalars"]:
            steps = events.Scalars("train_loss")
            return [step.value for step in steps], {step.step: step.wall_time for step in steps}
    raise FileNotFoundError(f"{work}: no TensorBoard file with train_loss")


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(folder: Path, style: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What the judges read in pictures of the same prompts and seeds: of the base model and with each file.

    For "base", "ours" and "diffusers": the share read as the style, the mean probability of the style, the share of
    prompted attributes read right, and which of the pictures were read as the style.
    """
    kept = folder / "readings.json"
    if kept.is_file():
        return json.loads(kept.read_text("utf-8"))  # type: ignore[no-any-return]
    import numpy as np
    import torch

    from lora_scripts.builtin.judges import load_judges
    from lora_scripts.builtin.world import caption, random_scene
    from lora_scripts.export.names import layer_shapes
    from lora_scripts.export.reader import read_lora_file
    from lora_scripts.families.protocol import SampleRequest
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.models.stable_diffusion import load_stable_diffusion
    from lora_scripts.sampling.denoise import render
    from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA

    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(seed + 1_000_003)  # other scenes than those that were trained
    scenes = [random_scene(rng) for _ in range(options.prompts)]
    requests = [
        SampleRequest(
            f"{style}, {caption(scene, rng)}", seed=seed + number, steps=options.render_steps, width=SIDE, height=SIDE
        )
        for number, scene in enumerate(scenes)
    ]
    device = torch.device(options.device)
    parts = load_stable_diffusion(resolve_base_model(BASE_MODEL), device, torch.float32)
    components = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    judges = load_judges()
    readings = {}
    for who, name in (("base", None), ("ours", "lora"), ("diffusers", "pytorch_lora_weights")):
        print(f"{style}, seed {seed}: rendering, {who} ...", flush=True)
        loras = []
        if name:
            file = folder / who / "run" / f"{name}.safetensors"
            loras.append(WeightedLoRA(read_lora_file(file, layer_shapes(components)).weights))
        with torch.no_grad(), LoRASet(components, loras):
            images = render(parts, requests, device, batch_size=16)
        (folder / "pictures_after" / who).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(folder / "pictures_after" / who / f"{number + 1:02d}.png")
        looks = judges.style_probabilities(images)
        found = [max(look, key=look.__getitem__) == style for look in looks]
        right = [
            read[kind] == getattr(scene, kind)
            for read, scene in zip(judges.read_attributes(images), scenes, strict=True)
            for kind in read
        ]
        readings[who] = {
            "style": sum(found) / len(found),
            "style_probability": statistics.fmean(look[style] for look in looks),
            "attributes": sum(right) / len(right),
            "found": found,
        }
    kept.write_text(json.dumps(readings) + "\n", "utf-8")
    return readings


# Telling --------------------------------------------------------------------------------------------------------------


def tables(setup: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown: what was read, and what training took."""
    names = ("base", "ours", "diffusers")
    lines = [
        "| style | seed | read as the style: base | ours | diffusers' | probability: ours | diffusers' "
        "| attributes right: base | ours | diffusers' |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def row(style: str, seed: str, chosen: Sequence[Mapping[str, Any]]) -> str:
        def mean(who: str, what: str) -> float:
            return statistics.fmean(pair["readings"][who][what] for pair in chosen)

        cells = [percent(mean(who, "style")) for who in names]
        cells += [f"{mean(who, 'style_probability'):.3f}" for who in SIDES]
        cells += [percent(mean(who, "attributes")) for who in names]
        return f"| {style} | {seed} | {' | '.join(cells)} |"

    lines += [row(pair["style"], str(pair["seed"]), [pair]) for pair in pairs]
    lines += [row("**all**", "", pairs)] if len(pairs) > 1 else []
    found = [
        hits
        for p in pairs
        for hits in zip(p["readings"]["ours"]["found"], p["readings"]["diffusers"]["found"], strict=True)
    ]
    lines += [
        "",
        f"Of {len(found)} pictures of the same prompt and seed, {found.count((True, True))} are read as the style with "
        f"both files, {found.count((True, False))} with ours alone, {found.count((False, True))} with diffusers' alone, "
        f"{found.count((False, False))} with neither.",
        "",
        "| training of | steps/s | process, s | its CPU time, s | loss, last third |",
        "|---|---|---|---|---|",
    ]
    for side in SIDES:
        cells = []
        for what, digits in (("steps_per_s", 2), ("wall_s", 1), ("cpu_s", 1), ("loss", 4)):
            values = [pair["training"][side][what] for pair in pairs]
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.{digits}f}{spread}")
        lines.append(f"| {'ours' if side == 'ours' else 'the example'} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {number}" for name, number in setup["versions"].items())
    lines += [
        "",
        f"{setup['steps']} steps of batch {setup['batch_size']}, rank {setup['rank']}, rate {setup['learning_rate']:g}, "
        f"{setup['lr_scheduler']} with {setup['warmup_steps']} steps of warm-up; {setup['prompts']} prompts per file, "
        f"{setup['render_steps']} denoising steps. {setup['machine']}, threads per process: {setup['threads']}. "
        f"{versions}. SHA-256 of the base's weights {setup['base_sha256'][:12]}, of the example script "
        f"{setup['script_sha256'][:12]}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
