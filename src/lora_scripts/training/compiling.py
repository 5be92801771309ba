"""Parts of the model compiled one by one, at work in training passes alone.

A U-Net or a decoder consists of few kinds of blocks, each repeated many times: compiled block by block, equal ones share their
code, so it takes seconds where the whole model takes minutes. Modules, their names and their weights stay what they are, so
adapters, checkpoints and exports know nothing of it. Measurements and previews run as ever: their shapes are others, and to
compile for them would cost more than it gains.

Source: torch.compile, regional compilation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lora_scripts.models.segment_attention import keep_out_of_graphs
from lora_scripts.models.single_file import user_cache

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CompiledParts", "compiler_fault", "use_lasting_cache"]

MOST_VARIANTS = 512
"""Of one function: kinds of blocks, times shapes of pictures. Beyond it torch goes on without compiling."""


class CompiledParts:
    """Modules with a compiled twin of their call.

    Args:
        few_shapes: compile anew for every shape, which makes the fastest code; else once for all lengths.
        backend: of torch.compile.
    """

    def __init__(self, parts: Sequence[nn.Module], *, few_shapes: bool, backend: str = "inductor") -> None:
        _allow_many_variants()
        keep_out_of_graphs()
        dynamic = not few_shapes
        self._calls: list[tuple[nn.Module, Any]] = [
            (part, torch.compile(part._call_impl, dynamic=dynamic, backend=backend)) for part in parts
        ]

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within the block the parts run compiled; a backward pass that computes activations again belongs into it."""
        # As `nn.Module.compile` does it, but so that it can be undone.
        for part, call in self._calls:
            part.__dict__["_compiled_call_impl"] = call
        try:
            yield
        finally:
            for part, _ in self._calls:
                del part.__dict__["_compiled_call_impl"]


def compiler_fault(device: torch.device) -> str:
    """Why nothing can be compiled for this device, in few words; empty where a first function could be."""
    from torch._dynamo import config

    try:
        with torch.enable_grad(), config.patch(suppress_errors=False):
            x = torch.ones(16, device=device, requires_grad=True)
            torch.compile(_first_function, dynamic=False)(x).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # compilers, drivers and headers are missing in many ways, each with a class of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return (lines[0] if lines else type(error).__name__)[:160]
    return ""


def use_lasting_cache() -> None:
    """Compiled code is kept in the user's cache folder, so that the next run begins at once; the variable of torch wins."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "compiled"))


def _first_function(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2 + x


def _allow_many_variants() -> None:
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MOST_VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * MOST_VARIANTS)
    # What cannot be compiled after all runs as it is.
    config.suppress_errors = True
