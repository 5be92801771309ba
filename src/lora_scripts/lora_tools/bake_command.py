"""`lora-scripts bake`: a LoHa, LoKr, DoRA or OFT as a plain LoRA that every program reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_scripts.atomic_file import require_new_file
from lora_scripts.lora_tools.ranks import RankChoice, add_rank_arguments, rank_choice

__all__ = ["add_arguments", "run"]

BY_DEFAULT = RankChoice(keep=0.9975, most=128)
"""What is left out is then at most 5 % as long as the change, wherever rank 128 is enough for that."""


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

    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.adapter_files.endings import KINDS
    from lora_scripts.lora_tools.bake import bake_file
    from lora_scripts.lora_tools.finished import file_dtype, kohya_names_of, reworked_texts, write_finished

    base = None
    if arguments.base_model is not None:
        from lora_scripts.models.layer_files import open_layer_files
        from lora_scripts.models.source import resolve_base_model

        base = open_layer_files(resolve_base_model(arguments.base_model, task="text-to-image"))
    file = open_adapter_file(arguments.lora, base.shapes if base else None)
    if base is not None:
        base.require_layers(file.path, file.layers, file.title)
    names = base.kohya_names if base is not None else kohya_names_of([file])
    dtype = file_dtype(file, arguments.save_precision)
    weights, losses = bake_file(file, choice, dtype, base.weight if base else None)
    kinds = ", ".join(KINDS[kind] for kind in file.kinds)
    line = f"baked from {file.path.name} ({kinds}) into a plain LoRA of rank {losses.ranks}: {losses}"
    texts = reworked_texts(file.metadata, arguments.output, weights, line)
    texts["ss_network_args"] = "{}"
    proof = write_finished(arguments.output, weights, names, texts, dtype)
    if arguments.report:
        print("\n".join(map(str, losses.cuts)))
    print(f"{file.path}: {kinds}, {len(file.layers)} layers")
    print(f"{arguments.output}: plain LoRA of rank {losses.ranks}; {losses}")
    print(proof)
    print(f"Look at it: lora-scripts inspect {arguments.output}")
    return 0
