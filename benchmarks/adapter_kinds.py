"""Time of a linear layer with each kind of adapter beside plain LoRA and PEFT's layers: one forward and one backward pass.

    python benchmarks/adapter_kinds.py [--threads 1] [--rounds 5]

All are run in turn, the clock is the process's own time, and the best of the rounds counts; float32.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from torch import nn

from lora_scripts.adapters.lora import attach

SHAPES = [(320, 320, 1024), (768, 768, 1024), (2048, 2048, 512), (2048, 2048, 2048)]
"""in, out, rows."""
OURS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "PiSSA": {"init": "pissa"},
    "DoRA": {"kind": "dora"},
    "LoHa": {"kind": "loha"},
    "LoKr": {"kind": "lokr", "lokr_factor": 8},
    "OFT": {"kind": "oft"},
}
PEFT: dict[str, Any] = {
    "PEFT's LoRA": lambda rank: LoraConfig(r=rank, lora_alpha=16, target_modules=["layer"]),
    "PEFT's DoRA": lambda rank: LoraConfig(r=rank, lora_alpha=16, target_modules=["layer"], use_dora=True),
    "PEFT's LoHa": lambda rank: LoHaConfig(r=rank, alpha=16, target_modules=["layer"]),
    "PEFT's LoKr": lambda rank: LoKrConfig(r=rank, alpha=16, decompose_factor=8, target_modules=["layer"]),
    "PEFT's OFT": lambda rank: OFTConfig(r=0, oft_block_size=rank, target_modules=["layer"]),
}


def layers(inside: int, out: int, rank: int) -> dict[str, nn.Module]:
    found = {}
    for name, options in OURS.items():
        net = nn.ModuleDict({"layer": nn.Linear(inside, out)})
        attach({"net": net}, {"net": ["layer"]}, rank=rank, alpha=16.0, **options)
        found[name] = net["layer"]
    for name, config in PEFT.items():
        net = nn.ModuleDict({"layer": nn.Linear(inside, out)})
        found[name] = inject_adapter_in_model(config(rank), net)["layer"]
    return found


def best_ms(shape: tuple[int, int, int], rank: int, rounds: int) -> dict[str, float]:
    """Kind to milliseconds of one forward and one backward pass."""
    inside, out, rows = shape
    x, grad = torch.randn(rows, inside, requires_grad=True), torch.randn(rows, out)
    contest = layers(inside, out, rank)
    repeats = max(1, round(3e8 / (rows * inside * out)))
    best = dict.fromkeys(contest, float("inf"))
    for _ in range(rounds):
        for name, layer in contest.items():
            began = time.process_time()
            for _ in range(repeats):
                layer(x).backward(grad)
                x.grad = None
                layer.zero_grad()
            best[name] = min(best[name], 1e3 * (time.process_time() - began) / repeats)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    others = [name for name in (*OURS, *PEFT) if name != "LoRA"]
    print(f"| layer | rank | LoRA ms | {' | '.join(f'{name} / LoRA' for name in others)} |")
    print("|---" * (3 + len(others)) + "|", flush=True)
    for shape in SHAPES:
        for rank in (8, 16):
            times = best_ms(shape, rank, arguments.rounds)
            ratios = " | ".join(f"{times[name] / times['LoRA']:.2f}" for name in others)
            print(
                f"| {shape[0]} -> {shape[1]}, {shape[2]} rows | {rank} | {times['LoRA']:.2f} | {ratios} |", flush=True
            )


if __name__ == "__main__":
    main()
