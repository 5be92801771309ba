"""What a file's header says of the network: kohya's or LyCORIS's module, and the arguments it was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig

__all__ = ["network_args", "network_module"]

_ALGO = {"lora": "lora", "locon": "locon", "dora": "locon", "loha": "loha", "lokr": "lokr", "oft": "diag-oft"}
"""Kind of adapter to LyCORIS's name of its algorithm."""


def network_module(config: RunConfig, own_kind: bool) -> str:
    """`ss_network_module`: a plain LoRA, with convolutions or without, is what kohya's own module reads."""
    return "lycoris.kohya" if own_kind and config.adapter not in ("lora", "locon") else "networks.lora"


def network_args(config: RunConfig, own_kind: bool, alpha: float) -> dict[str, str]:
    """`ss_network_args`: what the module of that name takes, and how a plain file was trained where not as a plain LoRA.

    Args:
        own_kind: whether the file has the tensors of its kind; else it holds a plain LoRA.
        alpha: of the file's layers; in a plain one it is that of the convolutions too.
    """
    args: dict[str, str] = {}
    if config.adapter == "locon" or config.conv_rank is not None:
        conv_rank = config.conv_rank or config.lora_rank
        args["conv_dim"] = str(conv_rank)
        conv_alpha = config.conv_alpha or config.alpha * conv_rank / config.lora_rank
        args["conv_alpha"] = f"{conv_alpha if own_kind else alpha:g}"
    if network_module(config, own_kind) == "lycoris.kohya":
        args["algo"] = _ALGO[config.adapter]
        if config.adapter == "dora":
            args["dora_wd"] = "True"
        if config.adapter == "lokr":
            args["factor"] = str(-1 if config.lokr_factor == "auto" else config.lokr_factor)
        return args
    names = ("adapter", "use_rslora", "lora_init", "lora_plus_ratio")
    if config.adapter in ("lora", "locon") and not config.use_rslora and config.lora_init != "pissa":
        return args
    changed = {name: str(getattr(config, name)) for name in names if name in config.model_fields_set}
    return args | {"trained_rank": str(config.lora_rank)} | changed
