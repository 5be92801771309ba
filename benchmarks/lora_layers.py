"""Time of our LoRA layers beside PEFT's on the same frozen layers: one forward and one backward pass.

    python benchmarks/lora_layers.py [--device cuda] [--threads 1] [--rounds 15] [--markdown FILE]

Both sides hold float32 adapter weights. In bfloat16 PEFT runs under autocast, as the training scripts of diffusers do.
The two are run in turn, round by round, and the ratio is the median over the rounds, so that a machine that is busy with
something else disturbs both alike; with one thread on a CPU the clock is the process's own time for the same reason.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lora_scripts.adapters.lora import attach

RANK, ALPHA = 8, 16.0
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]

Run: TypeAlias = Callable[[nn.Module, torch.dtype, torch.device], Tensor]


@dataclass(frozen=True)
class Case:
    """One layer and its input: rows of a linear layer, or a picture of a convolution."""

    name: str
    layer: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


def linear(rows: int, width: int, out: int) -> Case:
    return Case(f"linear {width} -> {out}, {rows} rows", lambda: nn.Linear(width, out), (1, rows, width))


def conv(kernel: int, width: int, out: int, side: int, batch: int) -> Case:
    name = f"conv {kernel}x{kernel} {width} -> {out}, {batch} x {side} x {side}"
    return Case(name, lambda: nn.Conv2d(width, out, kernel, padding=kernel // 2), (batch, width, side, side))


CASES = [
    linear(1024, 64, 64),
    linear(1024, 128, 128),
    linear(256, 256, 256),
    linear(1024, 128, 1024),
    linear(4096, 320, 320),
    linear(1024, 640, 640),
    linear(256, 1280, 1280),
    linear(308, 768, 320),
    conv(1, 128, 128, 16, 4),
    conv(3, 128, 128, 16, 4),
    conv(3, 320, 320, 16, 2),
]


def unet() -> tuple[nn.Module, Run]:
    """A U-Net with the classes of Stable Diffusion 1.5 and about 4 million weights, and one pass through it."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )

    def run(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(4, 4, 16, 16, generator=generator).to(device, dtype).requires_grad_()
        text = torch.randn(4, 77, 128, generator=generator).to(device, dtype)
        out: Tensor = model(latents, torch.tensor([1, 300, 600, 900], device=device), text).sample
        return out

    return model, run


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds.

    Attributes:
        base_ms, peft_ms, ours_ms: forward and backward pass of the frozen module, with PEFT's layers, with ours.
        ratio: PEFT's time over ours, paired by round.
        peft_kept_bytes, ours_kept_bytes: what autograd keeps between the passes, weights left out.
    """

    base_ms: float
    peft_ms: float
    ours_ms: float
    ratio: float
    peft_kept_bytes: int
    ours_kept_bytes: int


class Contest:
    """The same frozen module plain, with PEFT's adapter and with ours."""

    def __init__(self, module: nn.Module, names: list[str], run: Run, dtype: torch.dtype, device: torch.device) -> None:
        module.requires_grad_(False).to(device, dtype)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
        self.modules = {"base": copy.deepcopy(module), "peft": inject_adapter_in_model(config, copy.deepcopy(module))}
        for name, parameter in self.modules["peft"].named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        attach({"unet": module}, {"unet": names}, rank=RANK, alpha=ALPHA)
        self.modules["ours"] = module
        self.run, self.dtype, self.device = run, dtype, device

    def figures(self, rounds: int) -> Figures:
        kept = {side: self._kept_bytes(side) for side in self.modules}
        repeats = max(1, min(50, round(0.03 / self._seconds("peft", 1))))
        times = {side: [] for side in self.modules}
        for _ in range(rounds):
            for side in self.modules:
                times[side].append(self._seconds(side, repeats))
        middle = {side: 1e3 * statistics.median(values) for side, values in times.items()}
        ratio = statistics.median(p / o for p, o in zip(times["peft"], times["ours"], strict=True))
        return Figures(middle["base"], middle["peft"], middle["ours"], ratio, kept["peft"], kept["ours"])

    def _seconds(self, side: str, repeats: int) -> float:
        """Seconds of one forward and backward pass."""
        self._synchronise()
        clock = time.process_time if self.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        for _ in range(repeats):
            out = self._forward(side)
            out.backward(torch.ones_like(out))
            for parameter in self.modules[side].parameters():
                parameter.grad = None
        self._synchronise()
        return (clock() - began) / repeats

    def _forward(self, side: str) -> Tensor:
        autocast = side == "peft" and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=autocast):
            return self.run(self.modules[side], self.dtype, self.device)

    def _kept_bytes(self, side: str) -> int:
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.modules[side].parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = self._forward(side)
        del out
        return sum(kept.values())

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def contest(case: Case, dtype: torch.dtype, device: torch.device) -> Contest:
    x = torch.randn(case.input_shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()

    def run(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
        x.grad = None
        out: Tensor = module["layer"](x)
        return out

    return Contest(nn.ModuleDict({"layer": case.layer()}), ["layer"], run, dtype, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)

    lines = [
        "| layer | dtype | frozen ms | PEFT ms | ours ms | PEFT / ours | kept PEFT MiB | kept ours MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for dtype_name in arguments.dtypes:
        dtype = getattr(torch, dtype_name)
        for case in [case for case in CASES if arguments.only in case.name]:
            lines.append(row(case.name, dtype, contest(case, dtype, device).figures(arguments.rounds)))
            print(lines[-1], flush=True)
        for names, what in [(ATTENTION, "attention"), (EVERYTHING, "attention, feed-forward, convolutions")]:
            if arguments.only not in (name := f"whole U-Net, 4 M, {what}"):
                continue
            module, run = unet()
            figures = Contest(module, names, run, dtype, device).figures(arguments.rounds)
            lines.append(row(name, dtype, figures))
            print(lines[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


def row(name: str, dtype: torch.dtype, figures: Figures) -> str:
    kept = f"{figures.peft_kept_bytes / 2**20:.2f} | {figures.ours_kept_bytes / 2**20:.2f}"
    times = f"{figures.base_ms:.2f} | {figures.peft_ms:.2f} | {figures.ours_ms:.2f} | {figures.ratio:.2f}"
    return f"| {name} | {str(dtype).removeprefix('torch.')} | {times} | {kept} |"


if __name__ == "__main__":
    main()
