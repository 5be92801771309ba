"""What a measurement was taken on: processor, memory, versions, and how fast it multiplies matrices at that moment."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
SIDES = (512, 1024, 2048)
"""Of the matrices on a CPU: which is the fastest depends on its caches and its matrix unit."""


def processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Those of the processor's extensions that bfloat16 products depend on."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if f" {name}" in text]


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine_facts(device: str, threads: int) -> dict[str, Any]:
    """Everything about the machine that shapes a figure."""
    import torch

    facts: dict[str, Any] = {
        "processor": processor(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["gpu_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def said(facts: dict[str, Any]) -> str:
    """The same as a sentence for people."""
    names = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    where = f"{facts['processor']} ({', '.join(facts['instructions'])}), {facts['cores']} cores"
    where += f", {facts['gpu']}" if "gpu" in facts else f", {facts['threads']} threads per process"
    return f"{where}. {names}."


def matmul_peak(device: str, precision: str, threads: int, seconds: float = 0.6) -> float:
    """Floating-point operations per second of the fastest of some matrix products, as they run now."""
    import torch

    from lora_scripts.training.matmul_rate import matmul_rate

    torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    place = torch.device(device)
    sides = SIDES if place.type == "cpu" else (4096, 8192)
    return max(matmul_rate(place, dtype, seconds / len(sides), side=side) for side in sides)


def load() -> float:
    """Processes that wanted a core, mean of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
