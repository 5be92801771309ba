"""Time of LoRA layers that read the same input: one by one, with their LoRA products together, with the frozen weights joined too.

    python benchmarks/same_input.py [--threads 2] [--seconds 3] [--update-docs]

One forward and one backward pass over all layers of a group. The three ways are run in turn, and a ratio is the median over the
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from style_vs_diffusers import processor, update_docs  # which makes src importable
from torch import Tensor, nn

from lora_scripts.adapters.lora import Adapter, attach

CASES: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {
    "SD 1.5 at 512 px, outer blocks, q k v": (4096, 320, (320,) * 3, torch.bfloat16),
    "SD 1.5, second blocks, q k v": (1024, 640, (640,) * 3, torch.bfloat16),
    "SD 1.5, third blocks, q k v": (256, 1280, (1280,) * 3, torch.bfloat16),
    "SD 1.5, outer blocks, k v of the caption": (77, 768, (320,) * 2, torch.bfloat16),
    "SD 1.5, third blocks, k v of the caption": (77, 768, (1280,) * 2, torch.bfloat16),
    "Llama of 2048, 1,000 tokens, q k v": (1000, 2048, (2048, 512, 512), torch.bfloat16),
    "Llama of 512, 600 tokens, q k v": (600, 512, (512, 256, 256), torch.float32),
    "Llama of 512, 600 tokens, gate up": (600, 512, (1408,) * 2, torch.float32),
    "Llama of 64, 300 tokens, q k v": (300, 64, (64, 32, 32), torch.float32),
}
"""Rows, width in, widths out, number format."""
WAYS = ("one by one", "together", "joined")


class Layers(nn.Module):
    """Linear layers of different widths on one input."""

    def __init__(self, width: int, outs: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, out, bias=False, dtype=dtype) for out in outs)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each group of layers")
    parser.add_argument("--update-docs", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        "| layers | rows, in, out | number format | one by one, ms | LoRA products together | frozen weights joined too |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        lines.append(row(name, *case, options.seconds))
        print(lines[-1], flush=True)
    lines += [
        "",
        f"Ratios: how many times faster than one by one. {processor()}, torch {torch.__version__}, threads: {options.threads}.",
    ]
    if options.update_docs:
        update_docs("\n".join(lines) + "\n", "same_input")


def row(name: str, rows: int, width: int, outs: tuple[int, ...], dtype: torch.dtype, seconds: float) -> str:
    sides = {way: side(way, width, outs, dtype) for way in WAYS}
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    grads = [torch.randn(rows, out).to(dtype) for out in outs]
    for model, adapter in sides.values():
        passed(model, adapter, x, grads)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for way, (model, adapter) in sides.items():
            times[way].append(passed(model, adapter, x, grads))
    ratios = [statistics.median(a / b for a, b in zip(times[WAYS[0]], times[way], strict=True)) for way in WAYS[1:]]
    kind = str(dtype).removeprefix("torch.")
    shape = f"{rows}, {width}, {' + '.join(map(str, outs))}"
    return f"| {name} | {shape} | {kind} | {1e3 * statistics.median(times[WAYS[0]]):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"


def side(way: str, width: int, outs: tuple[int, ...], dtype: torch.dtype) -> tuple[Layers, Adapter]:
    torch.manual_seed(0)
    model = Layers(width, outs, dtype)
    names = [f"parts.{number}" for number in range(len(outs))]
    adapter = attach({"unet": model}, {"unet": names}, rank=8, alpha=8.0)
    if way != WAYS[0]:
        adapter.compute_together([[f"unet.{name}" for name in names]], joined=way == "joined")
    return model, adapter


def passed(model: Layers, adapter: Adapter, x: Tensor, grads: list[Tensor]) -> float:
    began = time.perf_counter()
    torch.autograd.grad(model(x), [x, *adapter.parameters()], grads)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
