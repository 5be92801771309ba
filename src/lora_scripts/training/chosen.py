"""What `auto` stood for when a run began, read from its checkpoints: it goes on as it began, wherever it is resumed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from lora_scripts.training.checkpoint import list_checkpoints

__all__ = ["Chosen"]


@dataclass(frozen=True)
class Chosen:
    """The values in force in a run, whether written or chosen.

    Attributes:
        dtype: number format of the frozen weights.
        low_bit: kind of 8 bits that frozen layers multiply in, or none.
        num_processes: that it ran on; `gradient_accumulation_steps` counts what all of them did.
    """

    batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    dtype: torch.dtype
    num_processes: int = 1
    low_bit: str = "none"
    block_swap: int = 0

    @property
    def step_size(self) -> int:
        """Pictures per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @classmethod
    def read(cls, output_dir: Path) -> Self | None:
        """Those of the run in this folder, None when it holds no checkpoint that can be read.

        All checkpoints of a run agree in them, so the newest that can be read will do, verified or not.
        """
        for folder in reversed(list_checkpoints(output_dir)):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                state = json.loads((folder / "state.json").read_text("utf-8"))
                identity = state["identity"]
                return cls(
                    int(identity["batch_size"]),
                    int(identity["gradient_accumulation_steps"]),
                    bool(state["loop"].get("checkpointing", False)),
                    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
                        identity["mixed_precision"]
                    ],
                    int(state["loop"].get("num_processes", 1)),
                    str(identity.get("low_bit_matmul", "none")),
                    int(state["loop"].get("block_swap", 0)),
                )
        return None
