"""What vLLM takes of a LoRA, as a table of rules that a folder is held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["VLLM_RANKS", "vllm_faults"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `--max-lora-rank`. Source: vllm-project/vllm, `vllm/config/lora.py`, MaxLoRARanks."""

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq")


def vllm_faults(config: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """What vLLM would refuse of a PEFT folder, one line each; empty for a good one.

    Args:
        config: the content of adapter_config.json.
        keys: the names of the tensors.
    Source: vllm-project/vllm, `vllm/lora/peft_helper.py` and `vllm/lora/utils.py`.
    """
    faults = []
    if config.get("r") not in VLLM_RANKS:
        faults.append(f"r is {config.get('r')}, which is not one of {', '.join(map(str, VLLM_RANKS))}")
    if type(config.get("lora_alpha")) is not int:
        faults.append(f"lora_alpha is {config.get('lora_alpha')!r}, which is no integer")
    if not isinstance(config.get("target_modules"), list | str):
        faults.append("target_modules is missing")
    if config.get("use_dora"):
        faults.append("use_dora is set")
    if config.get("modules_to_save"):
        faults.append("modules_to_save holds whole layers")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        faults.append("biases are trained")
    if str(config.get("init_lora_weights", "")).startswith(_BASE_CHANGING):
        faults.append(f"init_lora_weights is {config['init_lora_weights']}, which changes the base")
    strange = [key for key in keys if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if strange:
        faults.append(f"{len(strange)} tensors are no lora_A or lora_B, {strange[0]} among them")
    return faults
