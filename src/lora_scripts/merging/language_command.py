"""`lora-scripts merge` into a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.atomic_folder import require_free
from lora_scripts.errors import ConfigError, DataError
from lora_scripts.export.language_base import open_base
from lora_scripts.export.reader import read_lora_file
from lora_scripts.merging.language_model import tokenizer_folder, write_merged_model

if TYPE_CHECKING:
    import argparse

    from lora_scripts.export.language_base import LanguageBase
    from lora_scripts.merging.language_model import WeightedLoras

__all__ = ["merge_into_language_model"]


def merge_into_language_model(arguments: argparse.Namespace, strengths: Sequence[float]) -> int:
    """Writes a folder of transformers with the LoRAs in its weights and compares; the exit code."""
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
    """Loads base and result, one after the other, which takes their memory."""
    from lora_scripts.export.prompt import probe_ids, prompt_facts, read_tokenizer
    from lora_scripts.merging.language_model import check_merged

    tokenizer = read_tokenizer(folder)
    effect = check_merged(base, loras, folder, probe_ids(tokenizer, int(base.skeleton().config.vocab_size)))
    print(
        f"{folder}: loaded, largest logit difference from base with LoRA {effect.largest_difference:.1e} "
        f"(the LoRA changes logits by {effect.trained_change:.1e}, root mean square)"
    )
    print("\n".join(prompt_facts(tokenizer, folder).lines()))


def _card(base: LanguageBase, loras: Sequence[Path], strengths: Sequence[float]) -> str:
    added = "\n".join(
        f"- {path.resolve().name}, weight {strength:g}" for path, strength in zip(loras, strengths, strict=True)
    )
    return f"# {base.title} with LoRA\n\n{base.title}, to whose weights lora-scripts has added:\n\n{added}\n"
