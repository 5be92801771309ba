"""`lora-scripts bake`: a LoHa, LoKr, DoRA or OFT as a plain LoRA that every program reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_scripts.atomic_file import require_new_file
from lora_scripts.lora_tools.baked_file import BY_DEFAULT, write_baked
from lora_scripts.lora_tools.ranks import add_rank_arguments, rank_choice

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("lora", type=Path, help="the adapter file")
    parser.add_argument("--output", type=Path, required=True, help="the new .safetensors file")
    parser.add_argument("--base-model", help="the model it was trained on; a DoRA or OFT needs it")
    add_rank_arguments(parser)
    parser.add_argument("--save-precision", choices=["fp16", "bf16", "fp32"], help="default: as the file has it")
    parser.add_argument("--report", action="store_true", help="also print a line on every layer")
    parser.add_argument("--force", action="store_true", help="replace --output if it is there already")


def run(arguments: argparse.Namespace) -> int:
    """Bakes, writes and reads back; the exit code."""
    chosen = arguments.rank is not None or arguments.keep is not None or arguments.max_rank is not None
    choice = rank_choice(arguments.rank, arguments.keep, arguments.max_rank) if chosen else BY_DEFAULT
    require_new_file(arguments.output, [arguments.lora], force=arguments.force)

    baked = write_baked(arguments.lora, arguments.output, choice, arguments.base_model, arguments.save_precision)
    if arguments.report:
        print("\n".join(map(str, baked.losses.cuts)))
    print(f"{arguments.lora}: {baked.kinds}, {len(baked.file.layers)} layers")
    print(f"{arguments.output}: plain LoRA of rank {baked.losses.ranks}; {baked.losses}")
    print(baked.proof)
    print(f"Look at it: lora-scripts inspect {arguments.output}")
    return 0
