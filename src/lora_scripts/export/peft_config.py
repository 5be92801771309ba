"""The scale of LoRA files that keep it outside the tensors: PEFT's `adapter_config.json`, diffusers' header entry."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_scripts.errors import ModelError

__all__ = ["LANGUAGE_MODEL_TASK", "AdapterConfig", "folder_config", "header_configs"]

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the configuration of a LoRA in a file's header."""

LANGUAGE_MODEL_TASK = "CAUSAL_LM"

_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda")
"""Initialisations that subtract the adapter's start from the base's weights: beside the plain base it would add too much."""

_KINDS = ("LORA", "LOHA", "LOKR")
"""PEFT's kinds whose tensors are named and meant as LyCORIS's; its OFT is another one than LyCORIS's."""

_PLAIN_PATTERN = re.compile(r"\^?[\w.\-]+\$?")


@dataclass(frozen=True)
class AdapterConfig:
    """What of a PEFT LoraConfig decides the scale.

    Attributes:
        lora_alpha: the scale's numerator, for layers that `alpha_pattern` does not name.
        alpha_pattern: ending of a layer's path (with `^` in front: the whole path) to its alpha.
        use_rslora: the scale is alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        task_type: "CAUSAL_LM" for a language model, empty for a picture model.
        base_model: `base_model_name_or_path`, empty where it is not said.
    """

    lora_alpha: float
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    task_type: str = ""
    base_model: str = ""

    def alpha_of(self, spellings: Sequence[str], rank: int) -> float:
        """Alpha of a layer so that alpha / rank is its scale; `spellings` are the paths it may be called by."""
        alpha = self.lora_alpha
        for pattern, value in self.alpha_pattern.items():
            if any(_matches(pattern, path) for path in spellings):
                alpha = value
                break
        return alpha * math.sqrt(rank) if self.use_rslora else alpha


def _matches(pattern: str, path: str) -> bool:
    whole = pattern.startswith("^")
    name = pattern.removeprefix("^").removesuffix("$")
    return path == name or (not whole and path.endswith(f".{name}"))


def folder_config(file: Path, *, plain_only: bool = True) -> AdapterConfig:
    """The configuration beside a PEFT weights file.

    Args:
        plain_only: False to take DoRA, LoHa and LoKr as well.
    Raises:
        ModelError: there is none, it cannot be read, or it describes a kind that is not asked for.
    """
    path = file.with_name("adapter_config.json")
    if not path.is_file():
        raise ModelError(
            f"{file}: adapter_config.json is missing beside it, and without it the strength (lora_alpha) is unknown. "
            "Give the whole PEFT folder."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}). Export the adapter again.") from error
    return _config(path, values, plain_only)


def header_configs(file: Path, header: Mapping[str, str], *, plain_only: bool = True) -> dict[str, AdapterConfig]:
    """Component to configuration, from diffusers' header entry; empty where the file has none.

    Args:
        plain_only: False to take DoRA, LoHa and LoKr as well.
    Raises:
        ModelError: the entry cannot be read, or it describes a kind that is not asked for.
    """
    if METADATA_KEY not in header:
        return {}
    try:
        values = json.loads(header[METADATA_KEY])
    except ValueError as error:
        raise ModelError(f"{file}: its header entry {METADATA_KEY} is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: its header entry {METADATA_KEY} is not a table of settings.")
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, _, setting = str(key).partition(".")
        if setting:
            by_component.setdefault(component, {})[setting] = value
    return {component: _config(file, settings, plain_only) for component, settings in by_component.items()}


def _config(source: Path, values: Any, plain_only: bool) -> AdapterConfig:
    if not isinstance(values, dict):
        raise ModelError(f"{source}: is not a table of settings.")
    kind = str(values.get("peft_type", "LORA")).upper()
    if kind not in (_KINDS[:1] if plain_only else _KINDS):
        raise ModelError(f"{source}: the adapter is of type {kind}. Only plain LoRA can be read here.")
    for setting, what in (("use_dora", "DoRA"), ("modules_to_save", "LoRA with whole layers (modules_to_save)")):
        if values.get(setting) and (plain_only or setting != "use_dora"):
            raise ModelError(f"{source}: the adapter is a {what}. Only plain LoRA can be read here.")
    if values.get("bias", "none") != "none" or values.get("lora_bias"):
        raise ModelError(f"{source}: the adapter changes biases as well. Only plain LoRA can be read here.")
    start = str(values.get("init_lora_weights", ""))
    if start.startswith(_CHANGES_THE_BASE):
        raise ModelError(
            f"{source}: the adapter was started with {start} and fits only the base that this start has changed. Save it "
            "as a difference to the plain base (in PEFT: path_initial_model_for_weight_conversion)."
        )
    try:
        rank = int(values.get("r", 0))
        alpha = float(values["lora_alpha"] if "lora_alpha" in values else values.get("alpha", rank))
        patterns = {str(name): float(value) for name, value in (values.get("alpha_pattern") or {}).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{source}: r, lora_alpha or alpha_pattern are not numbers ({error}).") from error
    strange = [name for name in patterns if not _PLAIN_PATTERN.fullmatch(name)]
    if strange:
        raise ModelError(
            f"{source}: alpha_pattern holds a regular expression ({strange[0]}); only layer names are read."
        )
    task = str(values.get("task_type") or "")
    base = str(values.get("base_model_name_or_path") or "")
    return AdapterConfig(alpha, patterns, bool(values.get("use_rslora", False)), task, base)
