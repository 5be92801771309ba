"""`lora-scripts resize`: a LoRA file made smaller."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_scripts.atomic_file import require_new_file
from lora_scripts.errors import ConfigError
from lora_scripts.lora_tools.ranks import add_rank_arguments, rank_choice

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("lora", type=Path, help="the LoRA file")
    parser.add_argument("--output", type=Path, required=True, help="the new .safetensors file")
    add_rank_arguments(parser)
    parser.add_argument("--conv-rank", type=int, help="another rank for convolutions with kernels above 1x1")
    parser.add_argument("--save-precision", choices=["fp16", "bf16", "fp32"], help="default: as the file has it")
    parser.add_argument("--report", action="store_true", help="also print a line on every layer")
    parser.add_argument("--force", action="store_true", help="replace --output if it is there already")


def run(arguments: argparse.Namespace) -> int:
    """Resizes, writes and reads back; the exit code."""
    linear = rank_choice(arguments.rank, arguments.keep, arguments.max_rank)
    if arguments.conv_rank is not None and arguments.keep is not None:
        raise ConfigError(
            "--conv-rank: has an effect with --rank alone; with --keep the share decides for every layer."
        )
    conv = linear if arguments.conv_rank is None else rank_choice(arguments.conv_rank, None, None)
    require_new_file(arguments.output, [arguments.lora], force=arguments.force)

    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.lora_tools.finished import file_dtype, kohya_names_of, reworked_texts, write_finished
    from lora_scripts.lora_tools.resize import history_line, resize_file

    file = open_adapter_file(arguments.lora)
    names = kohya_names_of([file])
    dtype = file_dtype(file, arguments.save_precision)
    weights, losses = resize_file(file, linear, conv, dtype)
    before = ", ".join(map(str, file.ranks))
    texts = reworked_texts(file.metadata, arguments.output, weights, history_line(file.path, before, losses))
    proof = write_finished(arguments.output, weights, names, texts, dtype)
    if arguments.report:
        print("\n".join(map(str, losses.cuts)))
    print(f"{file.path}: {len(weights)} layers of rank {before}, {_megabytes(file.path)}")
    print(f"{arguments.output}: rank {losses.ranks}, {_megabytes(arguments.output)}; {losses}")
    print(proof)
    print(f"Look at it: lora-scripts inspect {arguments.output}")
    return 0


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB" if path.is_file() else "a folder"
