"""A language model's LoRA as the folder that transformers, PEFT, vLLM and llama.cpp's converter read alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.atomic import write_atomically
from lora_scripts.atomic_folder import new_folder
from lora_scripts.builtin.weights import builtin_path, is_builtin
from lora_scripts.errors import DataError, ExportError
from lora_scripts.export.names import LANGUAGE_MODEL, split_layer
from lora_scripts.export.peft_config import LANGUAGE_MODEL_TASK
from lora_scripts.export.plain import plain_scale
from lora_scripts.export.writer import require_finite, safetensors_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.adapters.weights import LoRAWeights

__all__ = ["TOKENIZER_FILES", "WEIGHTS_FILE", "base_reference", "copy_tokenizer", "write_peft_folder"]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "README.md"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Every name under which a tokenizer of transformers, or its chat template, lies beside a model."""


def write_peft_folder(
    folder: str | Path,
    weights: LoRAWeights,
    base_model: str | Path,
    dtype: torch.dtype,
    *,
    tokenizer: Any = None,
    card: str = "",
    model_layers: Iterable[str] | None = None,
    replace: bool = False,
) -> Path:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and what is given besides; the folder.

    The same weights give the same bytes. The folder is there whole or not at all.

    Args:
        weights: plain LoRA with one rank and one whole alpha; layers are `language_model.<path in the model>`.
        base_model: as in `base_model:`; see `base_reference`.
        tokenizer: a folder whose tokenizer and chat template are copied, or a tokenizer of transformers to be saved; None
            leaves them out.
        card: text of README.md; empty for none.
        model_layers: all linear layers of the model, with or without the component in front. With them `target_modules` holds last names (`q_proj`)
            where these mean exactly the trained layers, without them always whole paths.
        replace: take the place of an older folder, which the program itself must have written.
    Raises:
        ExportError: not plain LoRA, a layer of another component, a number that is not finite or not in `dtype`, or the
            place cannot be written. Nothing was written.
    Source: huggingface/peft, `src/peft/utils/save_and_load.py` (names) and `tuners/lora/config.py` (settings).
    """
    folder = Path(folder)
    rank, alpha = plain_scale(weights)
    require_finite(folder, weights, dtype)
    tensors = _tensors(weights, dtype)
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_reference(base_model),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": _target_modules(weights, model_layers),
        "task_type": LANGUAGE_MODEL_TASK,
        "use_dora": False,
        "use_rslora": False,
    }
    try:
        with new_folder(folder, replace=replace) as partial:
            write_atomically(partial / WEIGHTS_FILE, safetensors_bytes(tensors, {"format": "pt"}))
            write_atomically(partial / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            if isinstance(tokenizer, str | Path):
                copy_tokenizer(Path(tokenizer), partial)
            elif tokenizer is not None:
                tokenizer.save_pretrained(str(partial))
            if card:
                write_atomically(partial / CARD_FILE, card)
    except DataError as error:
        raise ExportError(f"Export failed: {error}") from error
    return folder


def base_reference(base_model: str | Path) -> str:
    """What `base_model_name_or_path` says: the real path of a folder on this machine or of a built-in model, or a hub id."""
    text = str(base_model)
    if is_builtin(text):
        return str(builtin_path(text).resolve())
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copies the tokenizer and chat template that lie in one folder into another; the names of the files."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def _tensors(weights: LoRAWeights, dtype: torch.dtype) -> dict[str, Tensor]:
    """`base_model.model.<path>.lora_A.weight` [R, in] and `.lora_B.weight` [out, R], on the CPU and contiguous."""
    tensors = {}
    for layer, lora in sorted(weights.items()):
        component, path = split_layer(layer)
        if component != LANGUAGE_MODEL or lora.lora_A.ndim != 2:
            raise ExportError(
                f"Export failed: {layer} is no linear layer of a language model, which is all that a PEFT folder of one holds."
            )
        for part, tensor in (("lora_A", lora.lora_A), ("lora_B", lora.lora_B)):
            plain = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            tensors[f"base_model.model.{path}.{part}.weight"] = plain
    return tensors


def _target_modules(weights: LoRAWeights, model_layers: Iterable[str] | None) -> list[str]:
    """Sorted, since PEFT keeps a set, whose order changes from process to process."""
    paths = {split_layer(layer)[1] for layer in weights}
    if model_layers is not None:
        last_names = {path.rpartition(".")[2] for path in paths}
        existing = {layer.removeprefix(f"{LANGUAGE_MODEL}.") for layer in model_layers}
        if {path for path in existing if path.rpartition(".")[2] in last_names} == paths:
            return sorted(last_names)
    return sorted(paths)
