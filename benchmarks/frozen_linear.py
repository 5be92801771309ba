"""Time of the linear layers of Stable Diffusion 1.5 in float32 on a CPU: torch's own beside ours, forward and backward.

    python benchmarks/frozen_linear.py [--threads 2] [--rounds 7] [--update-docs]

One picture of 512 pixels; random weights and inputs. Both run in turn, round by round, and the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from low_bit_matmul import Shape, seconds, shapes
from style_vs_diffusers import DOCS, ROOT, processor, update_docs  # which makes src importable
from suite.telling import table
from torch import nn

from lora_scripts.models.frozen_linear import freeze_linears

HEADS = ("layer", "layers", "torch, ms", "ours, ms", "ours is faster", "differ at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--update-docs", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, torch_ms, our_ms = [], 0.0, 0.0
    for shape in shapes():
        theirs, ours, ratio, apart = times(shape, options.rounds)
        torch_ms, our_ms = torch_ms + shape.count * theirs, our_ms + shape.count * ours
        name = f"{shape.inside} -> {shape.out}, {shape.rows} rows"
        rows.append([name, f"{shape.count}", f"{theirs:.2f}", f"{ours:.2f}", f"{ratio:.2f}", f"{apart:.0e}"])
    count = sum(shape.count for shape in shapes())
    rows.append(["**all**", f"{count}", f"{torch_ms:.0f}", f"{our_ms:.0f}", f"{torch_ms / our_ms:.2f}", ""])
    text = table(HEADS, rows) + f"\n{processor()}, torch {torch.__version__}, threads: {options.threads}.\n"
    print(text)
    if options.update_docs:
        update_docs(text, "frozen_linear")


def times(shape: Shape, rounds: int) -> tuple[float, float, float, float]:
    """Median milliseconds of torch's layer and of ours, their ratio paired by round, and how far outputs of size 1 are apart."""
    torch.manual_seed(0)
    plain = nn.Linear(shape.inside, shape.out).requires_grad_(False)
    ours = nn.Linear(shape.inside, shape.out)
    ours.load_state_dict(plain.state_dict())
    freeze_linears(ours)
    x = torch.randn(shape.rows, shape.inside, requires_grad=True)
    grad = torch.randn(shape.rows, shape.out)
    apart = (plain(x) - ours(x)).abs().max().item()
    pairs = [(seconds(plain, x, grad), seconds(ours, x, grad)) for _ in range(rounds + 1)][1:]
    middles = [1e3 * statistics.median(pair[side] for pair in pairs) for side in (0, 1)]
    return middles[0], middles[1], statistics.median(a / b for a, b in pairs), apart


if __name__ == "__main__":
    main()
