"""`lora-scripts merge` without a base model: several LoRAs become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_scripts.atomic_file import require_new_file
from lora_scripts.errors import ConfigError
from lora_scripts.lora_tools.ranks import rank_choice

if TYPE_CHECKING:
    import argparse

    from lora_scripts.merging.lora_files import Method

__all__ = ["merge_lora_files"]


def merge_lora_files(arguments: argparse.Namespace, strengths: Sequence[float]) -> int:
    """Writes the weighted sum of the LoRAs, reads it back; the exit code."""
    method: Method = arguments.method or ("concat" if arguments.rank is None else "svd")
    if method == "concat" and arguments.rank is not None:
        raise ConfigError("--rank: concat has the sum of the ranks. Use --method svd to cut the sum to a rank.")
    if method == "svd":
        if arguments.rank is None:
            raise ConfigError("--method svd: needs --rank, the rank that the sum is cut to.")
        rank_choice(arguments.rank, None, None)
    if arguments.no_check:
        raise ConfigError("--no-check: has an effect with --base-model alone; a LoRA is always read back.")
    require_new_file(arguments.output, arguments.lora, force=arguments.force)

    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.lora_tools.finished import file_dtype, kohya_names_of, reworked_texts, write_finished
    from lora_scripts.merging.lora_files import joined_texts, require_one_model, sum_files

    files = [open_adapter_file(path) for path in arguments.lora]
    require_one_model(files)
    weighted = list(zip(files, strengths, strict=True))
    for file, strength in weighted:
        print(f"{file.path}: {len(file.layers)} layers of rank {', '.join(map(str, file.ranks))}, weight {strength:g}")
    names = kohya_names_of(files)
    dtype = file_dtype(files[0], arguments.save_precision)
    weights, losses = sum_files(weighted, method, arguments.rank, dtype)
    made = ", ".join(f"{file.name} at {strength:g}" for file, strength in weighted)
    result = str(losses) if method == "svd" else "the exact sum"
    line = f"added up from {made}: {result}"
    texts = reworked_texts(joined_texts(weighted), arguments.output, weights, line)
    proof = write_finished(arguments.output, weights, names, texts, dtype)
    ranks = sorted({tensors.rank for tensors in weights.values()})
    print(f"{arguments.output}: {len(weights)} layers of rank {', '.join(map(str, ranks))}; {result}")
    print(proof)
    print(f"Look at it: lora-scripts inspect {arguments.output}")
    return 0
