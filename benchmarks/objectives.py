"""What the options of the loss cost in a step, and what prior preservation keeps of the base model.

    python benchmarks/objectives.py costs [--rounds 12]
    python benchmarks/objectives.py prior [--steps 100] [--seed 42]

costs: a whole step (forward, backward, optimizer, average) of the built-in model, batch 4 at 128 px, all options in turn; the
clock is the process's own time, the best round counts, shown over the step without any option.

prior: the built-in model learns a style with a trigger word, without and with prior preservation. A judge that training never
sees reads how many pictures are in that style: with the trigger word, where they should be; without it, for the class prompt
and for other prompts, where they should not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

CLASS_PROMPT = "a red cat on the beach in daylight"
STYLE = "ink wash"
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "debiased_estimation": {"debiased_estimation": True},
    "loss_type: huber": {"loss_type": "huber"},
    "noise_offset": {"noise_offset": 0.05},
    "pyramid_noise_iterations: 8": {"pyramid_noise_iterations": 8},
    "input_perturbation": {"input_perturbation": 0.1},
    "ema_decay": {"ema_decay": 0.999},
    "prior_preservation_weight": {"prior_preservation_weight": 1.0, "prior_prompt": CLASS_PROMPT},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["costs", "prior"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    if options.what == "costs":
        print_costs(options.rounds)
    else:
        print_prior(options.steps, options.seed)


def print_costs(rounds: int) -> None:
    contest = {name: Contestant(changes) for name, changes in OPTIONS.items()}
    best = dict.fromkeys(contest, float("inf"))
    for number in range(rounds):
        for name, contestant in contest.items():
            began = time.process_time()
            contestant.step(number + 1)
            best[name] = min(best[name], time.process_time() - began)
    for name, seconds in best.items():
        print(f"{name}: {1000 * seconds:.0f} ms, {seconds / best['none']:.2f} times")


class Contestant:
    """A model with an adapter, ready to step."""

    def __init__(self, changes: dict[str, Any]) -> None:
        import torch

        from helpers.reference_training import load_family
        from lora_scripts.adapters.lora import attach
        from lora_scripts.families.protocol import Batch
        from lora_scripts.training.optimizers import ParameterGroup, make_optimizer

        self._decay = changes.get("ema_decay", 0.0)
        self._family = load_family("builtin:mini-sd", resolution=128, **changes)
        self._adapter = attach(
            self._family.components, {"unet": self._family.default_targets["unet"]}, rank=8, alpha=8.0
        )
        self._optimizer = make_optimizer("adamw", [ParameterGroup("unet", self._adapter.parameters(), 1e-4)])
        rows: dict[str, Any] = {}
        for encoder in self._family.encoders():
            rows |= encoder.run([torch.zeros(3, 128, 128)] if encoder.reads == "image" else ["a red cat"])[0]
        tensors = {name: torch.stack([row] * 4) for name, row in rows.items()}
        self._batch = Batch(tensors, ["a red cat"] * 4, [str(i) for i in range(4)])

    def step(self, number: int) -> None:
        from lora_scripts.training.draws import Draws
        from lora_scripts.training.ema import update_average

        self._family.loss(self._batch, Draws(number)).total.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._decay:
            update_average(self._optimizer, number, self._decay)


def print_prior(steps: int, seed: int) -> None:
    for name in ("none", "prior_preservation_weight"):
        with tempfile.TemporaryDirectory() as place:
            began = time.monotonic()
            file = train(Path(place), steps, seed, OPTIONS[name])
            minutes = (time.monotonic() - began) / 60
            print(f"{name}: {minutes:.1f} minutes; read as {STYLE}: {read_styles(file, seed)}", flush=True)


def train(folder: Path, steps: int, seed: int, changes: dict[str, Any]) -> Path:
    """The finished file of a run on 24 pictures of one style, with the captions that the world gives them."""
    import csv

    import numpy as np

    from lora_scripts.builtin.world import canonical_caption, draw, random_scene
    from lora_scripts.config import RunConfig
    from lora_scripts.train_command import train_and_report

    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(seed)
    with (pictures / "metadata.csv").open("w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table)
        rows.writerow(["filename", "prompt"])
        for number in range(24):
            scene = random_scene(rng)
            draw(scene, seed=seed * 1000 + number, style=STYLE).save(pictures / f"{number:02d}.png")
            rows.writerow([f"{number:02d}.png", f"{STYLE}, {canonical_caption(scene)}"])
    settings = {
        "train_data_dir": pictures, "base_model": "builtin:mini-sd", "output_dir": folder / "run", "trigger_word": STYLE,
        "lora_rank": 16, "batch_size": 4, "max_steps": steps, "save_steps": steps, "learning_rate": 3e-3, "seed": seed,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
        "sample_every": 0, "keep": "last", "validation_pictures": 0, **changes,
    }  # fmt: skip
    train_and_report(RunConfig.model_validate(settings), force=True)
    return folder / "run" / "run.safetensors"


def read_styles(file: Path, seed: int, count: int = 24) -> str:
    """Shares of pictures that the judge reads as the style, by kind of prompt."""
    import numpy as np
    import torch

    from lora_scripts.builtin.judges import load_judges
    from lora_scripts.builtin.world import caption, random_scene
    from lora_scripts.demo import GUIDANCE, percent, share
    from lora_scripts.export.names import layer_shapes
    from lora_scripts.export.reader import read_lora_file
    from lora_scripts.families.protocol import SampleRequest
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.models.stable_diffusion import load_stable_diffusion
    from lora_scripts.sampling.denoise import render
    from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA

    rng = np.random.default_rng(seed + 1_000_003)  # other scenes than those that were trained
    texts = [caption(random_scene(rng), rng) for _ in range(count)]
    groups = {
        "with the trigger word": [f"{STYLE}, {text}" for text in texts],
        "other prompts without it": texts,
        "the class prompt": [CLASS_PROMPT] * count,
    }
    parts = load_stable_diffusion(resolve_base_model("builtin:mini-sd"), torch.device("cpu"), torch.float32)
    lora = read_lora_file(file, layer_shapes(parts.components))
    judges, told = load_judges(), []
    for name, prompts in groups.items():
        requests = [
            SampleRequest(prompt, seed=seed + number, guidance=GUIDANCE, width=128, height=128)
            for number, prompt in enumerate(prompts)
        ]
        with torch.no_grad(), LoRASet(parts.components, [WeightedLoRA(lora.weights)]):
            found = judges.read_style(render(parts, requests, torch.device("cpu"), batch_size=16))
        told.append(f"{name} {percent(share(style == STYLE for style in found))}")
    return ", ".join(told)


if __name__ == "__main__":
    main()
