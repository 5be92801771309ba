"""A reworked LoRA put on the disk: its header texts, one alpha for all layers, written whole or not at all, and read back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapter_files.adapter_file import AdapterFile

__all__ = [
    "PRECISIONS",
    "file_dtype",
    "kohya_names_of",
    "require_plain_file",
    "reworked_texts",
    "rounded",
    "with_history",
    "write_finished",
]

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_STORED = {"F16": "float16", "BF16": "bfloat16"}
_HISTORY = "lora_scripts.history"


def require_plain_file(file: AdapterFile) -> None:
    """Does nothing where every layer is a plain LoRA and the file is sound.

    Raises:
        ModelError: it is damaged, or of another kind; says how to make it a plain one.
    """
    file.require_sound()
    other = next((layer for layer in file.layers.values() if layer.kind != "lora"), None)
    if other is not None:
        from lora_scripts.adapter_files.endings import KINDS

        raise ModelError(
            f"{file.path}: {other.file_name} is a {KINDS[other.kind]}, no plain LoRA. Make it one first: "
            f"lora-scripts bake {file.path} --output PLAIN.safetensors"
        )


def file_dtype(file: AdapterFile, precision: str | None) -> torch.dtype:
    """The dtype asked for, else the one that most of the file's matrices have."""
    import torch

    if precision is not None:
        name = PRECISIONS[precision]
    else:
        name = _STORED.get(file.dtypes().most_common(1)[0][0], "float32")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def kohya_names_of(files: Sequence[AdapterFile]) -> dict[str, str]:
    """Each layer's name in a kohya file: that of the published model, else the one that it has in a kohya file already.

    Raises:
        ModelError: a layer has none, because its model is not known.
    """
    from lora_scripts.adapter_files.reference import ARCHITECTURES, kohya_names

    names: dict[str, str] = {}
    for file in files:
        table = kohya_names(file.architecture) if file.architecture in ARCHITECTURES else {}
        for name, layer in file.layers.items():
            if name in table:
                names[name] = table[name]
            elif file.spelling == "kohya":
                names.setdefault(name, layer.file_name)
            elif name not in names:
                raise ModelError(
                    f"{file.path}: {layer.file_name} has no name in a kohya file; the file is for {file.title}. "
                    "These tools write LoRAs of Stable Diffusion 1, 2 and SDXL."
                )
    return names


def rounded(tensors: LoRATensors, dtype: torch.dtype) -> LoRATensors:
    """As the file will have it, so that no more than the file's own bytes are kept of a finished layer."""
    return LoRATensors(tensors.lora_A.to(dtype), tensors.lora_B.to(dtype), tensors.alpha)


def reworked_texts(
    metadata: Mapping[str, str], output: Path, weights: Mapping[str, LoRATensors], line: str
) -> dict[str, str]:
    """The header texts of the file before, with rank, alpha and name as they are now and a line of history.

    The hashes over the tensors are taken when the file is written.
    """
    ranks = Counter(tensors.rank for tensors in weights.values())
    alpha = next(iter(weights.values())).alpha
    return {
        **with_history(metadata, line),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": f"{alpha:g}",
        "ss_output_name": output.stem,
        "modelspec.title": output.stem,
    }


def with_history(metadata: Mapping[str, str], line: str) -> dict[str, str]:
    """The header texts with one more line on what was done to the file."""
    try:
        lines = json.loads(metadata.get(_HISTORY, "[]"))
    except ValueError:
        lines = []
    history = [*(str(text) for text in lines if isinstance(lines, list)), line]
    return {**metadata, _HISTORY: json.dumps(history, ensure_ascii=False)}


def write_finished(
    output: Path,
    weights: Mapping[str, LoRATensors],
    names: Mapping[str, str],
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> str:
    """Writes the file, reads it back and compares; a line on what was found.

    Raises:
        ExportError: a number does not fit the dtype, the place cannot be written, or the file changes nothing.
    """
    from lora_scripts.export.verify import verify_file
    from lora_scripts.export.writer import write_lora

    write_lora(output, weights, metadata, dtype, names)
    return verify_file(output, weights, names).told("what was computed")
