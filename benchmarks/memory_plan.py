"""Memory of a training step as it is predicted without computing anything, beside what the step then takes.

    python benchmarks/memory_plan.py [--base builtin:mini-sd] [--resolution 512] [--batches 1 2 4 8]

Without `--base`: Stable Diffusion 1.5's architecture with random weights (one file of 2.1 GB, made on the spot). On a CUDA
GPU the truth is `torch.cuda.max_memory_allocated`, and what torch reserved is shown beside it; on a CPU it is the allocator's
own record of one pass, weights left out. "factor" is taken / predicted: the plan allows for 1.1 until it has measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.families.protocol import Batch, ModelFamily


@dataclass
class Model:
    """What a step needs."""

    family: ModelFamily
    adapter: Adapter
    device: torch.device
    resolution: int

    def batch(self, size: int) -> Batch:
        """Empty pictures: only shapes decide about memory."""
        import torch

        from lora_scripts.families.protocol import Batch

        rows: dict[str, torch.Tensor] = {}
        for encoder in self.family.encoders():
            picture = torch.zeros(3, self.resolution, self.resolution)
            rows |= encoder.run([picture] if encoder.reads == "image" else ["a cat"])[0]
        tensors = {name: torch.stack([row] * size).to(self.device) for name, row in rows.items()}
        return Batch(tensors, ["a cat"] * size, [str(i) for i in range(size)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", help="another base model than Stable Diffusion 1.5 with random weights")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = options.base
        if base is None:
            from helpers.full_size import write_full_size

            base = str(Path(folder) / "sd15.safetensors")
            write_full_size(base, "sd15")
        compare(load(base, options), options.batches)


def load(base: str, options: argparse.Namespace) -> Model:
    from lora_scripts.attaching import attach_adapter
    from lora_scripts.config import RunConfig
    from lora_scripts.devices import choose_device, choose_dtype, describe_device
    from lora_scripts.families import family_class
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.training.events import Events

    config = RunConfig(
        train_data_dir=Path(),
        base_model=base,
        output_dir=Path(),
        lora_rank=options.rank,
        mixed_precision=options.precision,
    )
    source = resolve_base_model(base)
    device = choose_device(options.device)
    dtype = choose_dtype(config, device, source)
    family = family_class(source.family).load(source, config, device, dtype)
    print(f"{options.base or 'Stable Diffusion 1.5 (random weights)'}, {options.resolution} px, rank {options.rank}")
    print(f"{describe_device(device)}, {str(dtype).removeprefix('torch.')}\n")
    return Model(family, attach_adapter(family, config, Events()), device, options.resolution)


def compare(model: Model, sizes: list[int]) -> None:
    from lora_scripts.planning.activations import predicted_peak
    from lora_scripts.training.draws import Draws

    batches = {size: model.batch(size) for size in (1, *sizes)}
    model.family.release_encoders()
    print("| checkpointing | batch | predicted MB | taken MB | factor | predicted in s |\n|---|---|---|---|---|---|")
    for checkpointing in (False, True):
        model.family.set_checkpointing(checkpointing)
        for size in sizes:
            began = time.perf_counter()
            predicted = predicted_peak(
                lambda batch: model.family.loss(batch, Draws(0)).total,
                batches[1],
                size,
                list(model.adapter.parameters()),
            )
            seconds = time.perf_counter() - began
            taken, more = taken_by(model, batches[size])
            cells = f"{predicted / 1e6:.0f} | {taken / 1e6:.0f}{more} | {taken / predicted:.3f} | {seconds:.1f}"
            print(f"| {'on' if checkpointing else 'off'} | {size} | {cells} |", flush=True)


def taken_by(model: Model, batch: Batch) -> tuple[int, str]:
    """Bytes that a real pass takes at its worst moment, and a remark."""
    import torch

    from lora_scripts.training.draws import Draws

    def step() -> None:
        model.family.loss(batch, Draws(0)).total.backward()  # type: ignore[no-untyped-call]

    step()  # what is made once is made here
    model.adapter.zero_grad()
    try:
        return (_on_cuda if torch.cuda.is_available() and model.device.type == "cuda" else _on_cpu)(step, model.device)
    finally:
        model.adapter.zero_grad()


def _on_cuda(step: Callable[[], None], device: torch.device) -> tuple[int, str]:
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    step()
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_allocated(device) - allocated
    return taken, f" (reserved {(torch.cuda.max_memory_reserved(device) - reserved) / 1e6:.0f})"


def _on_cpu(step: Callable[[], None], device: torch.device) -> tuple[int, str]:
    from helpers.allocator import allocated_peak

    return allocated_peak(step), ""


if __name__ == "__main__":
    main()
