"""The adapter that a config asks for, put into a loaded family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_scripts.adapters.blocks import check_blocks
from lora_scripts.adapters.kinds import AdapterForm
from lora_scripts.adapters.lora import attach
from lora_scripts.adapters.presets import with_preset
from lora_scripts.adapters.targets import has_layer, match_layers, split_targets
from lora_scripts.export.names import layer_shapes
from lora_scripts.going_on import go_on_from, open_for_init

if TYPE_CHECKING:
    from torch import nn

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
    if config.adapter == "locon" or config.conv_rank is not None:
        targets = with_convolutions(targets, family.conv_targets, components)
    older = None
    if config.init_lora_weights is not None:  # opened first: a wrong file is told before memory is taken
        older = open_for_init(config.init_lora_weights, layer_shapes(family.components))
    layers = [f"{c}.{path}" for c, names in targets.items() for path in match_layers(c, components[c], names)]
    ranks, rates = with_preset(
        config.preset,
        family.block_roles,
        layers,
        size_of(config),
        config.learning_rate,
        config.block_ranks,
        config.block_rates,
    )
    adapter = attach(components, targets, seed=config.seed, form=adapter_form(config, ranks))
    if config.fuse_layers:  # swapped blocks have places of their own for their weights
        adapter.compute_together(family.same_input(), joined=family.joins_weights and config.block_swap == 0)
    check_blocks("block_rates", rates, adapter.layers)
    adapter.block_rates = rates
    if older is not None:
        for line in go_on_from(adapter, older):
            events.note(line)
        events.note(f"Training goes on from {config.init_lora_weights}, with a fresh optimizer.")
    return adapter


def adapter_form(config: RunConfig, block_ranks: Mapping[str, int]) -> AdapterForm:
    """What the settings say about kind, ranks and scales."""
    return AdapterForm(
        rank=size_of(config),
        alpha=config.alpha,
        dropout=config.lora_dropout,
        init=_init(config),
        kind=config.adapter,
        use_rslora=config.use_rslora,
        conv_rank=config.conv_rank,
        conv_alpha=config.conv_alpha,
        lokr_factor=None if config.lokr_factor == "auto" else config.lokr_factor,
        block_ranks=block_ranks,
    )


def size_of(config: RunConfig) -> int:
    """`lora_rank`, or of an OFT the size of its blocks."""
    return config.oft_block_size if config.adapter == "oft" else config.lora_rank


def with_convolutions(
    targets: Mapping[str, Sequence[str]], convolutions: Mapping[str, Sequence[str]], components: Mapping[str, nn.Module]
) -> dict[str, Sequence[str]]:
    """The targets and the convolutions of the same components, as far as the model has them (no `conv_shortcut`, say)."""
    present = {
        component: [name for name in names if has_layer(component, components[component], name)]
        for component, names in convolutions.items()
        if component in components
    }
    return {c: [*targets.get(c, ()), *present.get(c, ())] for c in {**targets, **present}}


def _init(config: RunConfig) -> LoRAInit:
    """auto is what the learning rates in use are made for: diffusers' scripts for pictures, PEFT's default for text."""
    if config.lora_init != "auto":
        return config.lora_init
    return "kaiming" if config.task_type == "text-generation" else "gaussian"
