"""Time of the ways to multiply a linear layer with a low-rank change, forward and backward, at shapes of language models.

    python benchmarks/product_orders.py [--threads 1] [--rounds 7] [--dtypes float32] [--only 2048]

- ours: `adapters/low_rank.py`, the rank along the rows of every narrow product;
- narrow columns: the same products with the rank along the columns, as they are usually written;
- merged: the change added to the weight first, in the forward and the backward pass; fewest operations with many rows;
- plain: torch operations, as PEFT writes them;
- frozen: the layer without a change.

All ways are run in turn, the clock is the process's own time, and the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_scripts.adapters.low_rank import linear_low_rank

SCALE = 2.0
SHAPES = [
    (768, 768, 256),
    (768, 768, 2048),
    (768, 3072, 1024),
    (2048, 2048, 512),
    (2048, 2048, 2048),
    (4096, 4096, 256),
]
"""in, out, rows."""
RANKS = (8, 16, 64)


class _NarrowColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        a, b = A.to(x.dtype), (B * SCALE).to(x.dtype)
        low = F.linear(x, a)
        ctx.save_for_backward(x, weight, a, b, low)
        return F.linear(x, weight).addmm_(low, b.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_low = grad @ b
        grad_x = (grad @ weight).addmm_(grad_low, a)
        return grad_x, None, (grad_low.t() @ x).float(), (grad.t() @ low).float().mul_(SCALE)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        a, b = A.to(x.dtype), B.to(x.dtype)
        merged = torch.addmm(weight, b, a, alpha=SCALE)
        ctx.save_for_backward(x, merged, a, b)
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        grad_a = ((b.t() @ grad.t()) @ x).float().mul_(SCALE)
        grad_b = ((a @ x.t()) @ grad).t().float().mul_(SCALE)
        return grad @ merged, None, grad_a, grad_b


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "ours": lambda x, weight, A, B: linear_low_rank(x, weight, None, A, B, SCALE),
    "narrow columns": _NarrowColumns.apply,
    "merged": _Merged.apply,
    "plain": lambda x, weight, A, B: F.linear(x, weight) + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * SCALE,
    "frozen": lambda x, weight, A, B: F.linear(x, weight),
}


def best_ms(shape: tuple[int, int, int], rank: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Way to milliseconds of one forward and one backward pass."""
    inside, out, rows = shape
    weight, x = torch.randn(out, inside).to(dtype), torch.randn(rows, inside).to(dtype).requires_grad_()
    A, B = torch.randn(rank, inside).requires_grad_(), torch.randn(out, rank).requires_grad_()
    grad = torch.randn(rows, out).to(dtype)
    repeats = max(1, round(5e8 / (rows * inside * out)))
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for way, run in WAYS.items():
            began = time.process_time()
            for _ in range(repeats):
                run(x, weight, A, B).backward(grad)
                x.grad = A.grad = B.grad = None
            best[way] = min(best[way], 1e3 * (time.process_time() - began) / repeats)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="run the shapes whose name contains this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    others = [way for way in WAYS if way != "ours"]
    print(f"| layer | rank | dtype | ours ms | {' | '.join(f'{way} / ours' for way in others)} |")
    print("|---" * (4 + len(others)) + "|", flush=True)
    for dtype in arguments.dtypes:
        for shape in SHAPES:
            name = f"{shape[0]} -> {shape[1]}, {shape[2]} rows"
            for rank in RANKS if arguments.only in name else ():
                times = best_ms(shape, rank, getattr(torch, dtype), arguments.rounds)
                ratios = " | ".join(f"{times[way] / times['ours']:.2f}" for way in others)
                print(f"| {name} | {rank} | {dtype} | {times['ours']:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
