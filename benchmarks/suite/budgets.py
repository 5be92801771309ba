"""Training within a budget of memory: what our command chooses for it, and how fast that is.

The budget is `memory_limit_gb` of the run, by which it cuts its passes, checkpoints and swaps blocks; on a GPU torch is also held
to it, so that a run that takes more fails. Language models keep their frozen weights in NF4 or int8; "plain" runs leave the
weights as they are and nothing swapped, and say where they do not fit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite import ROOT
from suite.machine import load, machine_facts, matmul_peak, said
from suite.materials import SEED, make_base, make_pictures
from suite.telling import NOT_MEASURED, spread, table
from suite.trainers import Command
from suite.turns import Facts

BUDGETS_GB = (8.0, 16.0)
ROWS = 240
"""Dialogues of 60 to 400 tokens."""
CHOSEN = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "block_swap", "quantization")


@dataclass(frozen=True)
class Budget:
    """One run within a budget.

    Attributes:
        model: as `materials.make_base` takes it, or a size of `text_materials`.
        side: of the pictures, pixels; None for a language model.
        changes: settings beside the common ones.
        memory_gb: 10^9 bytes.
    """

    title: str
    model: str
    memory_gb: float
    device: str
    side: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


def budget_contests(device: str, tiny: bool, budgets_gb: Sequence[float] = BUDGETS_GB) -> dict[str, Budget]:
    """For each budget: SDXL, and a Llama with frozen weights of each kind."""
    base, side, llama = ("tiny-sdxl", 64, "tiny") if tiny else ("sdxl", 1024, "8b")
    fitted = {"block_swap": "auto"}
    plain = {"block_swap": 0, "gradient_checkpointing": False, "batch_size": 1}
    kinds = {
        "sdxl": (f"{base}, {side} px", base, side, {**fitted, "effective_batch": 1}),
        "sdxl-plain": (f"{base}, {side} px, plain", base, side, {**plain}),
        "llama-nf4": (f"Llama {llama}, NF4", llama, None, {"quantization": "nf4", "effective_batch": 4}),
        "llama-int8": (f"Llama {llama}, int8", llama, None, {"quantization": "int8", "effective_batch": 4}),
        "llama-swap": (f"Llama {llama}, bf16, blocks swapped", llama, None, {**fitted, "effective_batch": 4}),
        "llama-plain": (f"Llama {llama}, bf16, plain", llama, None, {**plain, "gradient_accumulation_steps": 4}),
    }
    return {
        f"budget-{gb:g}-{name}": Budget(title, model, gb, device, pixels, changes)
        for gb in budgets_gb
        for name, (title, model, pixels, changes) in kinds.items()
    }


def is_budget(name: str) -> bool:
    return name.startswith("budget-")


# Running --------------------------------------------------------------------------------------------------------------


def hold(budget: Budget, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What our command chose and how fast it is; "failed" with the reason where it does not fit."""
    folder = place / "runs" / "budget"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = settings_of(budget, place, options.steps) | {"output_dir": str(folder / "run")}
    (folder / "config.yaml").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")  # JSON is YAML too
    command = Command(
        sys.executable,
        ROOT / "train.py",
        ["--config", str(folder / "config.yaml")],
        stand_in=False,
        budget_gb=budget.memory_gb if budget.device.startswith("cuda") else None,
    )
    result = {
        "contest": asdict(budget),
        "settings": settings,
        "machine": machine_facts(budget.device, options.threads),
        "matmul_peak": matmul_peak(budget.device, "bf16", options.threads),
        "load": load(),
    }
    try:
        return result | measured(command, folder, options)
    except SystemExit as end:  # the run's last words, which say what it lacked
        return result | {"failed": last_words(str(end))}


def measured(command: Command, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    stepper = command.start("ours", folder, options.threads)
    try:
        steps: list[Facts] = [stepper.step() for _ in range(1 + options.steps)][1:]
        counted = stepper.step("flops")
    finally:
        stepper.close()
    lines = (folder / "run" / "record.jsonl").read_text("utf-8").splitlines()
    started = next(event for event in map(json.loads, lines) if event["event"] == "started")
    return {
        "chosen": {name: started["settings"].get(name) for name in CHOSEN},
        "memory_plan": started["settings"].get("memory", ""),
        "first_step_s": stepper.first_step_s,
        "wall_s": [step["wall_s"] for step in steps],
        "losses": [step["loss"] for step in steps],
        "peak_bytes": steps[-1]["peak_bytes"],
        "peak_cuda_bytes": steps[-1].get("peak_cuda_bytes"),
        "flops_per_step": counted["flops"],
    }


def settings_of(budget: Budget, place: Path, steps: int) -> dict[str, Any]:
    """Of our run; the model and its data are made where they are missing."""
    common = {
        "device": budget.device,
        "mixed_precision": "bf16",
        "lora_rank": 8,
        "batch_size": "auto",
        "memory_limit_gb": budget.memory_gb,
        "max_steps": 1000,  # the run is ended from outside
        "lr_scheduler": "constant",
        "seed": SEED,
        "save_steps": 1000,
        "sample_every": 0,
        **budget.changes,
    }
    if "auto" not in (common["batch_size"], common.get("block_swap", 0), common.get("gradient_checkpointing", "auto")):
        del common["memory_limit_gb"]  # nothing is left to choose
    if budget.side is None:
        from text_materials import make_base_and_dialogues

        folder = place / "bases" / f"llama-{budget.model}"
        make_base_and_dialogues(folder, budget.model, rows=ROWS, seed=SEED)
        own = {"task_type": "text-generation", "validation_dialogues": 0, "base_model": str(folder / "model")}
        return common | own | {"train_data_dir": str(folder / "data"), "cache_dir": str(folder / "cache")}
    base = make_base(place / "bases", budget.model)
    pictures = make_pictures(place / f"pictures-{budget.side}-budget", side=budget.side, batch_size=1, steps=steps + 3)
    own = {"base_model": str(base.file), "resolution": budget.side, "validation_pictures": 0, "vae_precision": "bf16"}
    return common | own | {"train_data_dir": str(pictures.plain), "cache_dir": str(pictures.plain.parent / "cache")}


def last_words(text: str) -> str:
    """The last line of a run's output, or the one that speaks of memory."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    of_memory = [line for line in lines if "out of memory" in line.lower()]
    return (of_memory or lines or [text])[-1][:200]


# Telling --------------------------------------------------------------------------------------------------------------

HEADS = (
    "budget",
    "what is trained",
    "batch, passes",
    "checkpointing",
    "blocks swapped",
    "s per step",
    "peak memory, GB",
    "of the matrix peak",
)


def tell(contests: Mapping[str, Budget], found: Mapping[str, Any], reason: str) -> str:
    """The table, and what it was taken with.

    Args:
        reason: why a run that has no result has none.
    """
    rows, notes = [], []
    for name, budget in contests.items():
        head = [f"{budget.memory_gb:g} GB", budget.title]
        result = found.get(name)
        if result is None or "failed" in result:
            why = f"{NOT_MEASURED}: {reason}" if result is None else f"does not run: {result['failed']}"
            rows.append([*head, why, *["-"] * (len(HEADS) - 3)])
            continue
        chosen = result["chosen"]
        memory = result["peak_cuda_bytes"] or result["peak_bytes"]
        share = result["flops_per_step"] / statistics.median(result["wall_s"]) / result["matmul_peak"]
        cut = f"{chosen['batch_size']} x {chosen['gradient_accumulation_steps']}"
        on = "on" if chosen["gradient_checkpointing"] is True else "off"
        rows.append(
            [
                *head,
                cut,
                on,
                str(chosen["block_swap"]),
                spread(result["wall_s"]),
                f"{memory / 1e9:.1f}",
                f"{100 * share:.0f} %",
            ]
        )
        notes.append(
            f"`{name}`: {len(result['wall_s'])} timed steps, {result['memory_plan'] or 'nothing to choose'}; matrix products "
            f"{result['matmul_peak'] / 1e12:.2f} TFLOP/s, load of the machine {result['load']:.1f}. {said(result['machine'])}\n"
        )
    return "\n".join([table(HEADS, rows), *notes])
