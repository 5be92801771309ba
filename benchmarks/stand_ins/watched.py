"""Runs a trainer as it is, stopped after every optimizer step, and tells what each step cost and what its loss was.

    PYTHON benchmarks/stand_ins/watched.py JOB.json TRAINER.py [its options]

The trainer is not changed: torch itself calls back after every step of an optimizer. The first step is taken without
waiting, so whoever started the process sees how long it takes to get there. A line "flops" on standard input lets the next step
be counted, any other line lets it run. JOB.json holds `threads`, `draws`: a file for `equal_draws.py`, or null,
and `budget_gb`: the memory of the GPU that torch may take, in 10^9 bytes, or null.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gate import Gate
from run_example import run_script

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


class Watch:
    """What is done between two steps."""

    def __init__(self, gate: Gate) -> None:
        import torch

        self._torch, self._gate = torch, gate
        self._losses: list[torch.Tensor] = []
        self._counter: Any = None

    def keep_losses(self) -> None:
        """Remembers every number that a backward pass starts from; none is fetched from the device before the step is over."""
        backward = self._torch.Tensor.backward

        def remembered(tensor: Any, *arguments: Any, **named: Any) -> None:
            self._losses.append(tensor.detach())
            backward(tensor, *arguments, **named)

        self._torch.Tensor.backward = remembered  # type: ignore[method-assign]

    def keep_our_losses(self) -> None:
        """Of our own trainer the sum of a step's passes: a recorded one has no backward pass to ask for."""
        sys.path.insert(0, str(ROOT / "src"))
        from lora_scripts.training.micro_batches import MicroBatches

        run = MicroBatches.run

        def remembered(passes: MicroBatches, *arguments: Any) -> Any:
            total, count = run(passes, *arguments)
            self._losses.append(total.detach())
            return total, count

        MicroBatches.run = remembered  # type: ignore[method-assign]

    def after_step(self, optimizer: Any, *_: Any) -> None:
        """Called by torch."""
        cuda = self._torch.cuda
        trained = [weight for group in optimizer.param_groups for weight in group["params"]]
        facts: dict[str, Any] = {"num_trained": sum(weight.numel() for weight in trained)}
        if cuda.is_available():
            cuda.synchronize()
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            facts["flops"] = self._counter.get_total_flops()
            self._counter = None
        facts["loss"] = float(sum(loss.double().item() for loss in self._losses))
        self._losses.clear()
        self._gate.tell(**facts)
        if self._gate.pause() == "flops":
            self._counter = flop_counter()
            self._counter.__enter__()


def flop_counter() -> Any:
    """torch's counter, which also knows of the attention that runs on CPUs, and of oneDNN's operations asked for by name."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad_out, query, key, value))

    def linear(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(2 * math.prod(x) * weight[0])

    def convolution(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(2 * math.prod(out_shape) * math.prod(weight[1:]))

    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        torch.ops.mkldnn._linear_pointwise: linear,
        torch.ops.mkldnn._convolution_pointwise: convolution,
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


def main() -> None:
    job: Mapping[str, Any] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    gate = Gate()  # before anything is printed
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(job["threads"])
    if job.get("budget_gb"):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["budget_gb"] * 1e9 / total))
    watch = Watch(gate)
    ours = Path(sys.argv[2]).resolve() == ROOT / "train.py"
    (watch.keep_our_losses if ours else watch.keep_losses)()
    if job["draws"]:
        import equal_draws

        steps = equal_draws.put_in_place(Path(job["draws"]))
        register_optimizer_step_post_hook(lambda *_: steps.next())
    register_optimizer_step_post_hook(watch.after_step)
    gate.tell(versions={name: found for name in PACKAGES if (found := _version(name))})
    run_script(Path(sys.argv[2]), sys.argv[3:], stand_in=job["stand_in"])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
