"""Rules between the settings of the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig

__all__ = ["adapter_faults", "adapter_size", "writes_own_kind"]

LOW_RANK = ("lora", "locon", "dora")


def adapter_faults(config: RunConfig, inert: Callable[[str, str], None]) -> list[str]:
    """What is wrong, one line each; what merely has no effect is told to `inert(setting, reason)`."""
    faults = []
    kind, reason = config.adapter, f"adapter is {config.adapter}"
    if kind == "locon" and config.task_type == "text-generation":
        faults.append("adapter: locon is for pictures; a language model has no convolutions. Use adapter: lora.")
    if kind not in LOW_RANK:
        inert("lora_init", reason)
        inert("lora_plus_ratio", reason)
    if kind == "oft":
        for setting in ("lora_rank", "lora_alpha", "use_rslora", "conv_rank", "conv_alpha"):
            inert(setting, f"{reason}, whose size is oft_block_size")
    else:
        inert("oft_block_size", reason)
    if kind == "lora":
        inert("conv_rank", f"{reason}; locon trains convolutions")
    if kind != "locon" and config.conv_rank is None:
        inert("conv_alpha", "no conv_rank says that convolutions train")
    if kind != "lokr":
        inert("lokr_factor", reason)
    if kind in ("lora", "locon") and config.export_as == "own":
        inert("export_as", f"{reason}, whose own form is a plain LoRA")
    if config.base_loras and kind in ("dora", "oft") and writes_own_kind(config):
        # Its readers apply it to the base model's own weight, which is not what it was trained on.
        faults.append(
            f"export_as: a {kind} in its own form depends on the weight it was trained on, and base_loras changes that. "
            "Set export_as: plain, or another adapter."
        )
    if config.lora_init == "pissa" and kind == "dora":
        faults.append("lora_init: pissa is not possible with adapter: dora. Remove one of them.")
    if config.optimizer == "prodigy":
        if config.lora_plus_ratio != 1:
            faults.append("lora_plus_ratio: prodigy finds one step size for all. Remove it, or set optimizer: adamw.")
        if config.block_rates:
            faults.append("block_rates: prodigy finds one step size for all. Remove them, or set optimizer: adamw.")
        if config.preset != "none":
            faults.append("preset: sets rates of blocks, and prodigy finds one for all. Remove it, or use block_ranks.")
    return faults


def writes_own_kind(config: RunConfig) -> bool:
    """Whether finished files have the tensors of the kind that was trained, not a plain LoRA; language models' never have."""
    if config.task_type == "text-generation":
        return False
    return config.export_as == "own" or (config.export_as == "auto" and config.adapter not in LOW_RANK)


def adapter_size(config: RunConfig) -> str:
    """Kind and size in words: "rank 8, alpha 8", "oft of blocks up to 32"."""
    if config.adapter == "oft":
        return f"oft of blocks up to {config.oft_block_size}"
    kind = "" if config.adapter == "lora" else f"{config.adapter}, "
    return f"{kind}rank {config.lora_rank}, alpha {config.alpha:g}"
