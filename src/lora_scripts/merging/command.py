"""`lora-scripts merge`: LoRAs become part of their base model, or several LoRAs become one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_scripts.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--base-model",
        help="add the LoRAs to this model: a .safetensors file, a folder, a hub id on this machine or builtin:NAME. "
        "Without it the LoRAs are added up into one LoRA",
    )
    parser.add_argument(
        "--lora", type=Path, action="append", required=True, help="file or PEFT folder; may be given several times"
    )
    parser.add_argument(
        "--weight",
        type=float,
        action="append",
        default=[],
        help="strength of the LoRA in the same place (default: 1); once, or as often as --lora",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a .safetensors file where the base model is one or LoRAs are added up, else a folder that holds no files",
    )
    parser.add_argument(
        "--method",
        choices=["concat", "svd"],
        help="without --base-model: concat is exact and has the sum of the ranks (default), svd cuts the sum to --rank",
    )
    parser.add_argument("--rank", type=int, help="rank of the sum with --method svd")
    parser.add_argument(
        "--save-precision",
        choices=["fp16", "bf16", "fp32"],
        help="without --base-model; default: as the first LoRA has it",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the result with base and LoRA after it is written"
    )
    parser.add_argument("--force", action="store_true", help="replace an --output file that is there already")


def run(arguments: argparse.Namespace) -> int:
    """Merges, writes and compares; the exit code."""
    strengths = _strengths(arguments.lora, arguments.weight)
    if arguments.base_model is None:
        from lora_scripts.merging.lora_command import merge_lora_files

        return merge_lora_files(arguments, strengths)
    without_effect = [name for name in ("method", "rank", "save_precision") if getattr(arguments, name) is not None]
    if without_effect:
        names = ", ".join("--" + name.replace("_", "-") for name in without_effect)
        raise ConfigError(
            f"{names}: has an effect without --base-model alone; the base model's numbers stay as they are."
        )

    from lora_scripts.families import family_class
    from lora_scripts.models.source import resolve_base_model

    source = resolve_base_model(arguments.base_model)
    if family_class(source.family).task == "text-generation":
        from lora_scripts.merging.language_command import merge_into_language_model

        return merge_into_language_model(arguments, strengths)
    from lora_scripts.merging.picture_command import merge_into_picture_model

    return merge_into_picture_model(source, arguments, strengths)


def _strengths(loras: Sequence[Path], weights: Sequence[float]) -> list[float]:
    if len(weights) not in (0, 1, len(loras)):
        raise ConfigError(
            f"--weight is given {len(weights)} times for {len(loras)} LoRAs. Give it once for all, or once for each."
        )
    if any(not -10 <= weight <= 10 for weight in weights):
        raise ConfigError("--weight: must be between -10 and 10.")
    return list(weights) * len(loras) if len(weights) == 1 else list(weights) or [1.0] * len(loras)
