"""The proof that a finished PEFT folder holds what was trained: read back from the disk, compared, and run.

As in `verify.py`, nothing is shared with the code that wrote the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ExportError
from lora_scripts.export.effect import Effect, measure_effect, side_paths
from lora_scripts.export.read_back import (
    Stored,
    StoredLayer,
    Verification,
    check_keys,
    compare_stored,
    read_tensors_by_hand,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_scripts.adapters.weights import LoRAWeights

__all__ = ["applied_folder", "verify_folder", "verify_folder_effect"]

_START = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight")
_COMPONENT = "language_model."


def verify_folder(folder: str | Path, expected: LoRAWeights) -> Verification:
    """Reads a finished PEFT folder back and compares it with what was trained.

    Raises:
        ExportError: the folder cannot be read; its settings make another scale of the tensors than was trained, or leave
            out a trained layer; a key is missing, unknown or of another shape; a number is not finite; a weight change
            is further from the trained one than the dtype explains; every change is zero.
    """
    folder = Path(folder)
    config = _config(folder)
    path = folder / "adapter_model.safetensors"
    tensors, metadata, header_bytes, dtype = read_tensors_by_hand(path)
    wanted = [_START + layer.removeprefix(_COMPONENT) + end for layer in expected for end in _ENDS]
    check_keys(path, tensors, wanted)
    layers = _layers(tensors, float(config["lora_alpha"]))
    for layer, trained in expected.items():
        module = layer.removeprefix(_COMPONENT)
        targets = config["target_modules"]
        if not any(module == target or module.endswith(f".{target}") for target in targets):
            raise ExportError(f"{folder}: failed: target_modules does not name {module}, so PEFT would leave it out.")
        if int(config["r"]) != trained.rank:
            raise ExportError(
                f"{folder}: failed: r is {config['r']} in the settings, {trained.rank} was trained in {module}."
            )
    return compare_stored(Stored(folder, layers, len(tensors), dtype, header_bytes, metadata), expected)


def verify_folder_effect(
    folder: str | Path,
    model: nn.Module,
    forward: Callable[[], Tensor],
    trained_output: Tensor,
    tolerance: float = 0.02,
    compute_dtype: torch.dtype | None = None,
) -> Effect:
    """Runs the model without any LoRA and with the folder's, and compares the folder's change with the trained one.

    Call it while the trained adapter is switched off or taken away.

    Args:
        model: the language model of transformers that the LoRA was trained on.
        forward, trained_output, tolerance, compute_dtype: as for `verify.verify_effect`.
    Raises:
        ExportError: the folder changes nothing in the output, or not what the trained adapter changes.
    """
    folder = Path(folder)
    return measure_effect(
        folder, forward, lambda: applied_folder(folder, model), trained_output, tolerance, compute_dtype
    )


@contextmanager
def applied_folder(folder: str | Path, model: nn.Module) -> Iterator[None]:
    """The folder's LoRA at work on the model, layer by layer beside the frozen weights; gone afterwards.

    Raises:
        ExportError: the folder cannot be read, or names a layer that the model lacks.
    """
    folder = Path(folder)
    layers = _layers(
        read_tensors_by_hand(folder / "adapter_model.safetensors")[0], float(_config(folder)["lora_alpha"])
    )
    modules = {_COMPONENT + name: module for name, module in model.named_modules()}
    strange = sorted(layers.keys() - modules.keys())
    if strange:
        raise ExportError(f"{folder}: failed: {strange[0]} is no layer of the model it was trained on.")
    with side_paths((modules[layer], stored) for layer, stored in layers.items()):
        yield


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        plain = config["peft_type"] == "LORA" and config["bias"] == "none" and config["task_type"] == "CAUSAL_LM"
        more = ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
        found = [name for name in more if config.get(name)]
        whole = type(config["lora_alpha"]) is int and type(config["r"]) is int
        settled = isinstance(config["target_modules"], list)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{path}: failed: the finished settings cannot be read back ({error!r}). Check the disk and export again."
        ) from error
    if found or not (plain and whole and settled):
        raise ExportError(f"{path}: failed: the settings are not those of plain LoRA with a whole alpha {found or ''}.")
    return dict(config)


def _layers(tensors: dict[str, Tensor], alpha: float) -> dict[str, StoredLayer]:
    layers = {}
    for key in tensors:
        if key.startswith(_START) and key.endswith(_ENDS[0]):
            module = key.removeprefix(_START).removesuffix(_ENDS[0])
            other = _START + module + _ENDS[1]
            if other in tensors:
                layers[_COMPONENT + module] = StoredLayer(
                    tensors[key], tensors[other], alpha, (key, other, "lora_alpha")
                )
    return layers
