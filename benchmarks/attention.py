"""Time of attention in tiles beside torch's own kernel on a CPU, in bfloat16: a forward and a backward pass.

    python benchmarks/attention.py [--threads 1] [--rounds 9]

The two are run in turn and the ratio is the median over the rounds. The errors are those of output and gradients together,
against the same in float64, as a share of their length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_scripts.models.tiled_attention import tiled_attention

CASES = {
    "SD 1.5 at 512 px, outer blocks": (1, 8, 4096, 4096, 40, False),
    "SD 1.5 at 512 px, second blocks": (1, 8, 1024, 1024, 80, False),
    "SD 1.5 at 512 px, third blocks": (1, 8, 256, 256, 160, False),
    "SD 1.5 at 512 px, outer blocks, captions": (1, 8, 4096, 77, 40, False),
    "SDXL at 1024 px, outer blocks": (1, 10, 4096, 4096, 64, False),
    "SDXL at 1024 px, inner blocks": (1, 20, 1024, 1024, 64, False),
    "BLIP-large, 4 pictures": (4, 16, 577, 577, 64, False),
    "12 causal heads, a dialogue of 200 tokens": (1, 12, 200, 200, 64, True),
    "8 causal heads, 2,048 tokens": (1, 8, 2048, 2048, 128, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| attention | queries x keys x width | torch's ms | tiles ms | ratio | error torch's | error tiles |")
    print("|---|---|---|---|---|---|---|")
    for name, (batch, heads, queries, keys, width, causal) in CASES.items():
        torch.manual_seed(0)
        tensors = [torch.randn(batch, n, heads, width).transpose(1, 2) for n in (queries, keys, keys, queries)]
        narrow = [each.bfloat16() for each in tensors]

        def by_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        def by_tiles(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
            out: Tensor = tiled_attention(q, k, v, causal=causal)
            return out

        exact = passes(by_torch, [each.double() for each in narrow])
        errors = [error(passes(side, narrow), exact) for side in (by_torch, by_tiles)]
        theirs, ours = [], []
        for _ in range(options.rounds):
            theirs.append(seconds(by_torch, narrow))
            ours.append(seconds(by_tiles, narrow))
        ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        times = f"{1e3 * statistics.median(theirs):.1f} | {1e3 * statistics.median(ours):.1f} | {ratio:.2f}"
        shape = f"{batch * heads} x {queries} x {keys} x {width}"
        print(f"| {name} | {shape} | {times} | {errors[0]:.4f} | {errors[1]:.4f} |", flush=True)


def passes(side: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    leaves = [each.detach().requires_grad_() for each in tensors[:3]]
    out = side(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def seconds(side: Callable[..., Tensor], tensors: list[Tensor]) -> float:
    began = time.perf_counter()
    passes(side, tensors)
    return time.perf_counter() - began


def error(got: list[Tensor], exact: list[Tensor]) -> float:
    parts = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
    return statistics.mean(parts)


if __name__ == "__main__":
    main()
