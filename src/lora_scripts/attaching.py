"""The adapter that a config asks for, put into a loaded family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_scripts.adapters.lora import attach
from lora_scripts.adapters.targets import split_targets
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.reader import read_lora_file

if TYPE_CHECKING:
    from lora_scripts.adapters.lora import Adapter, LoRAInit
    from lora_scripts.config import RunConfig
    from lora_scripts.families.protocol import ModelFamily
    from lora_scripts.training.events import Events

__all__ = ["attach_adapter"]


def attach_adapter(family: ModelFamily, config: RunConfig, events: Events) -> Adapter:
    """The adapter on the chosen layers, fresh or with the weights of an older LoRA.

    Raises:
        TargetError: a name in `target_modules` matches no layer.
        ModelError: the older LoRA cannot be read or fits nothing.
    """
    components = dict(family.components)
    if not config.train_text_encoder:
        components = {name: module for name, module in components.items() if not name.startswith("text_encoder")}
    targets: Mapping[str, Sequence[str]] = {name: family.default_targets[name] for name in components}
    if config.target_modules is not None:
        targets = split_targets(components, config.target_modules)
    older = None
    if config.init_lora_weights is not None:
        older = read_lora_file(config.init_lora_weights, layer_shapes(family.components))
    adapter = attach(
        components,
        targets,
        rank=config.lora_rank,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        seed=config.seed,
        init=_init(config),
        kind=config.adapter,
        use_rslora=config.use_rslora,
    )
    if older is not None:
        for line in adapter.load_weights(older.weights, strict=False):
            events.note(line)
        events.note(f"Training goes on from {config.init_lora_weights}, with a fresh optimizer.")
    return adapter


def _init(config: RunConfig) -> LoRAInit:
    """auto is what the learning rates in use are made for: diffusers' scripts for pictures, PEFT's default for text."""
    if config.lora_init != "auto":
        return config.lora_init
    return "kaiming" if config.task_type == "text-generation" else "gaussian"
