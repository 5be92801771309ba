"""Time of the frozen linear layers of Stable Diffusion 1.5 in 8 bits beside plain ones: one forward and one backward pass.

    python benchmarks/low_bit_matmul.py [--kind int8] [--dtypes bf16 fp32] [--device cpu] [--threads 2] [--rounds 7] [--update-docs]

One picture of 512 pixels; random weights and inputs. Both ways are run in turn, round by round, and the ratio is the median over
the rounds. Layers that a run leaves as they are stand in the table too, to show why.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from style_vs_diffusers import DOCS, ROOT, processor, update_docs  # which makes src importable
from torch import nn

from lora_scripts.low_bit_choice import require_low_bit
from lora_scripts.models.frozen_linear import freeze_linears
from lora_scripts.models.low_bit_layers import LEAST_WEIGHTS, LowBitLinear

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LEVELS = ((320, 4096, 5), (640, 1024, 5), (1280, 256, 5), (1280, 64, 1))
"""Width, positions and number of transformer blocks."""
CAPTION_WIDTH, CAPTION_TOKENS = 768, 77


@dataclass(frozen=True)
class Shape:
    """A layer, and how many of them the U-Net has."""

    rows: int
    inside: int
    out: int
    count: int


def shapes() -> list[Shape]:
    found = []
    for width, rows, blocks in LEVELS:
        found += [
            Shape(
                rows, width, width, 8 * blocks
            ),  # both attentions but keys and values of the caption; proj_in, proj_out
            Shape(CAPTION_TOKENS, CAPTION_WIDTH, width, 2 * blocks),
            Shape(rows, width, 8 * width, blocks),
            Shape(rows, 4 * width, width, blocks),
        ]
    return found


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    require_low_bit(options.kind, device)
    dtypes, kind = options.dtypes, options.kind
    plain_ms, run_ms = dict.fromkeys(dtypes, 0.0), dict.fromkeys(dtypes, 0.0)
    heads = [part for dtype in dtypes for part in (f"{dtype} ms", f"{kind} ms", f"{dtype} / {kind}")]
    lines = ["| " + " | ".join(["layer", "layers", *heads, "in a run"]) + " |", "|---" * (len(heads) + 3) + "|"]
    for shape in shapes():
        large = shape.inside * shape.out >= LEAST_WEIGHTS
        cells = [f"{shape.inside} -> {shape.out}, {shape.rows} rows", f"{shape.count}"]
        for dtype in dtypes:
            plain, low, ratio = times(shape, DTYPES[dtype], options, device)
            plain_ms[dtype] += shape.count * plain
            run_ms[dtype] += shape.count * (low if large else plain)
            cells += [f"{plain:.2f}", f"{low:.2f}", f"{ratio:.2f}"]
        lines.append("| " + " | ".join([*cells, kind if large else "plain"]) + " |")
        print(lines[-1], flush=True)
    sums = [
        f"{part}"
        for d in dtypes
        for part in (f"{plain_ms[d]:.0f}", f"{run_ms[d]:.0f}", f"{plain_ms[d] / run_ms[d]:.2f}")
    ]
    total = sum(shape.count for shape in shapes())
    lines.append("| " + " | ".join(["**all, as a run has them**", f"{total}", *sums, ""]) + " |")
    where = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    lines += ["", f"{where}, torch {torch.__version__}, threads: {options.threads}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.update_docs:
        update_docs(text, "low_bit_matmul")


def times(
    shape: Shape, dtype: torch.dtype, options: argparse.Namespace, device: torch.device
) -> tuple[float, float, float]:
    """Median milliseconds of a forward and backward pass, plain and in 8 bits, and their ratio, paired by round."""
    torch.manual_seed(0)
    layer = nn.Linear(shape.inside, shape.out, device=device, dtype=dtype)
    freeze_linears(layer)  # which is what a run has where nothing is in 8 bits
    low_bit = LowBitLinear(layer, options.kind)
    low_bit.in_low_bit = True
    x = torch.randn(shape.rows, shape.inside, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(shape.rows, shape.out, device=device, dtype=dtype)
    pairs = [(seconds(layer, x, grad), seconds(low_bit, x, grad)) for _ in range(options.rounds + 1)][1:]
    plain, low = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = statistics.median(a / b for a, b in pairs)
    return 1e3 * statistics.median(plain), 1e3 * statistics.median(low), ratio


def seconds(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> float:
    wait(x.device)
    began = time.perf_counter()
    layer(x).backward(grad)
    wait(x.device)
    taken = time.perf_counter() - began
    x.grad = None
    return taken


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["int8", "fp8"], default="int8")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"], help="of the plain products"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--update-docs", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
