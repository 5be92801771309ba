"""A language model with LoRAs merged in, as a folder of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.atomic import write_atomically
from lora_scripts.atomic_folder import new_folder
from lora_scripts.errors import DataError, ExportError, ModelError
from lora_scripts.export.effect import Effect, compare_effect, side_paths
from lora_scripts.export.language_base import LanguageBase
from lora_scripts.export.names import LANGUAGE_MODEL, split_layer
from lora_scripts.export.peft_folder import TOKENIZER_FILES, copy_tokenizer
from lora_scripts.merging.stream import Change, PlannedTensor, write_merged_file
from lora_scripts.models.layout_names import Place
from lora_scripts.models.weights_file import WeightsHeader

if TYPE_CHECKING:
    from torch import Tensor

    from lora_scripts.adapters.weights import LoRAWeights

__all__ = ["WeightedLoras", "check_merged", "tokenizer_folder", "write_merged_model"]

_COPIED = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")

WeightedLoras = Sequence[tuple["LoRAWeights", float]]
"""LoRAs with the strength that each is merged at."""


def write_merged_model(base: LanguageBase, loras: WeightedLoras, folder: Path, tokenizer: Path, card: str) -> Path:
    """Writes the whole model with the LoRAs added to its weights; the folder is there whole or not at all.

    The weights files are those of the base, tensor for tensor and in the same dtypes. Where the head shares its weights
    with the embedding and a LoRA changes the head alone, the head gets weights of its own.

    Args:
        tokenizer: the folder whose tokenizer and chat template go with the model.
        card: text of README.md.
    Raises:
        ModelError: a layer has no tensor in the base's files, or its tensor is quantised or of another shape.
        ExportError: the place cannot be written, or holds files.
    """
    changes = _changes_by_tensor(loras)
    headers = base.weights()
    plans, untied = _plan(base, headers, changes)
    try:
        with new_folder(folder) as partial:
            for header, plan in zip(headers, plans, strict=True):
                write_merged_file(header, plan, partial / header.path.name)
            _write_index(base, headers, plans, partial)
            config: dict[str, Any] = dict(base.config)
            if untied:
                config["tie_word_embeddings"] = False
            write_atomically(partial / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            for name in _COPIED:
                if (base.folder / name).is_file():
                    shutil.copyfile(base.folder / name, partial / name)
            copy_tokenizer(tokenizer, partial)
            write_atomically(partial / "README.md", card)
    except DataError as error:
        raise ExportError(f"Merge failed: {error}") from error
    return folder


def tokenizer_folder(base: LanguageBase, lora_folders: Sequence[Path]) -> Path:
    """The first of the LoRA folders that brings a tokenizer, since its chat template is the trained one; else the base's."""
    for folder in lora_folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES[:3]):
            return folder
    return base.folder


def check_merged(base: LanguageBase, loras: WeightedLoras, folder: Path, input_ids: Tensor) -> Effect:
    """Loads the merged model and compares its logits with those of the base with the LoRAs beside it.

    One model is in memory at a time.

    Args:
        input_ids: [1, L] what both read.
    Raises:
        ExportError: the merged model answers otherwise.
    """
    import torch

    model = base.load()
    layers = {f"{LANGUAGE_MODEL}.{path}": module for path, module in model.named_modules()}
    pairs = [
        (layers[layer], replace(lora, alpha=lora.alpha * strength))
        for weights, strength in loras
        for layer, lora in weights.items()
    ]
    with torch.no_grad():
        plain = model(input_ids).logits.float()
        with side_paths(pairs):
            beside = model(input_ids).logits.float()
    dtype = model.dtype
    del model, layers, pairs
    merged_model = LanguageBase(str(folder), folder).load()
    with torch.no_grad():
        merged = merged_model(input_ids).logits.float()
    return compare_effect(folder, plain, merged, beside, compute_dtype=dtype)


def _changes_by_tensor(loras: WeightedLoras) -> dict[str, list[Change]]:
    changes: dict[str, list[Change]] = {}
    for weights, strength in loras:
        for layer, lora in weights.items():
            changes.setdefault(f"{split_layer(layer)[1]}.weight", []).append(Change.of(lora, strength))
    return changes


def _plan(
    base: LanguageBase, headers: Sequence[WeightsHeader], changes: Mapping[str, Sequence[Change]]
) -> tuple[list[list[PlannedTensor]], bool]:
    """For each weights file the tensors of the new one, in the order they lie in; and whether the head was untied."""
    head, embedding = _tied_pair(base)
    untied = head in changes
    plans = []
    for header in headers:
        plan = []
        for name in sorted(header.tensors, key=lambda name: header.tensors[name].begin):
            if not (untied and name == head):
                plan.append(PlannedTensor(name, name, _of_all(changes.get(name, ()))))
            if untied and name == embedding:
                plan.append(PlannedTensor(head, embedding, _of_all(changes[head])))
        plans.append(plan)
    missing = sorted(set(changes) - {planned.name for plan in plans for planned in plan})
    if missing:
        raise ModelError(
            f"base_model {base.name}: its weights files have no {missing[0]}, which the LoRA changes: this kind of model "
            "stores its layers under other names or fused, and cannot be merged here. PEFT's merge_and_unload can."
        )
    return plans, untied


def _of_all(changes: Sequence[Change]) -> dict[Place | None, Sequence[Change]]:
    return {None: changes} if changes else {}


def _tied_pair(base: LanguageBase) -> tuple[str, str]:
    """(head, embedding): the tensors' names where the head has no weights of its own; empty texts where it has."""
    model = base.skeleton()
    text_config = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(text_config, "tie_word_embeddings", False) or head is None:
        return "", ""
    names = {module: path for path, module in model.named_modules()}
    return f"{names[head]}.weight", f"{names[embedding]}.weight"


def _write_index(
    base: LanguageBase, headers: Sequence[WeightsHeader], plans: Sequence[Sequence[PlannedTensor]], folder: Path
) -> None:
    if len(headers) == 1 and headers[0].path.name == "model.safetensors":
        return
    placed = {planned.name: header.path.name for header, plan in zip(headers, plans, strict=True) for planned in plan}
    total = sum(
        header.tensors[planned.source].num_bytes
        for header, plan in zip(headers, plans, strict=True)
        for planned in plan
    )
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
