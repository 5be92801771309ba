"""`lora-scripts merge`: a base model and one or more LoRAs become one model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lora_scripts.export.language_base import LanguageBase
    from lora_scripts.merging.language_model import WeightedLoras

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--base-model", required=True, help="folder, hub id on this machine or builtin:NAME")
    parser.add_argument(
        "--lora", type=Path, action="append", required=True, help="PEFT folder; may be given several times"
    )
    parser.add_argument(
        "--weight",
        type=float,
        action="append",
        default=[],
        help="strength of the LoRA in the same place (default: 1); once, or as often as --lora",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model; must not hold files")
    parser.add_argument(
        "--no-check", action="store_true", help="do not load base and result to compare them, which takes their memory"
    )


def run(arguments: argparse.Namespace) -> int:
    """Merges, writes and compares; the exit code."""
    from lora_scripts.atomic_folder import require_free
    from lora_scripts.export.language_base import open_base
    from lora_scripts.export.reader import read_lora_file
    from lora_scripts.merging.language_model import tokenizer_folder, write_merged_model

    strengths = _strengths(arguments.lora, arguments.weight)
    try:
        require_free(arguments.output)
    except DataError as error:
        raise ConfigError(f"--output {error}") from error
    base = open_base(arguments.base_model)
    shapes = base.layer_shapes()
    files = [read_lora_file(path, shapes) for path in arguments.lora]
    for file, strength in zip(files, strengths, strict=True):
        print(f"{file.path}: {len(file.weights)} layers of rank {', '.join(map(str, file.ranks))}, weight {strength:g}")
    loras = [(file.weights, strength) for file, strength in zip(files, strengths, strict=True)]
    tokenizer = tokenizer_folder(base, arguments.lora)
    write_merged_model(base, loras, arguments.output, tokenizer, _card(base, arguments.lora, strengths))
    print(f"{arguments.output}: written")
    if not arguments.no_check:
        _check(base, loras, arguments.output)
    return 0


def _check(base: LanguageBase, loras: WeightedLoras, folder: Path) -> None:
    from lora_scripts.export.prompt import probe_ids, prompt_facts, read_tokenizer
    from lora_scripts.merging.language_model import check_merged

    tokenizer = read_tokenizer(folder)
    effect = check_merged(base, loras, folder, probe_ids(tokenizer, int(base.skeleton().config.vocab_size)))
    print(
        f"{folder}: loaded, largest logit difference from base with LoRA {effect.largest_difference:.1e} "
        f"(the LoRA changes logits by {effect.trained_change:.1e}, root mean square)"
    )
    print("\n".join(prompt_facts(tokenizer, folder).lines()))


def _strengths(loras: Sequence[Path], weights: Sequence[float]) -> list[float]:
    if len(weights) not in (0, 1, len(loras)):
        raise ConfigError(
            f"--weight is given {len(weights)} times for {len(loras)} LoRAs. Give it once for all, or once for each."
        )
    if any(not -10 <= weight <= 10 for weight in weights):
        raise ConfigError("--weight: must be between -10 and 10.")
    return list(weights) * len(loras) if len(weights) == 1 else list(weights) or [1.0] * len(loras)


def _card(base: LanguageBase, loras: Sequence[Path], strengths: Sequence[float]) -> str:
    added = "\n".join(
        f"- {path.resolve().name}, weight {strength:g}" for path, strength in zip(loras, strengths, strict=True)
    )
    return f"# {base.title} with LoRA\n\n{base.title}, to whose weights lora-scripts has added:\n\n{added}\n"
