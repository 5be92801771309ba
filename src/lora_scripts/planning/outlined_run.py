"""A run's model, adapter and data as shapes alone, so that its passes can be predicted before there is anything to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_scripts.attaching import attach_adapter
from lora_scripts.families import family_class
from lora_scripts.planning.passes import Passes
from lora_scripts.tasks import require_inputs, task_of
from lora_scripts.training.events import Events

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.config import RunConfig
    from lora_scripts.models.source import BaseModel
    from lora_scripts.tasks.protocol import DataOutline, Progress

__all__ = ["OutlinedRun", "outlined_run"]


@dataclass(frozen=True)
class OutlinedRun:
    """What the planner asks; no weight was read."""

    adapter: Adapter
    data: DataOutline
    passes: Passes


def outlined_run(
    config: RunConfig,
    source: BaseModel,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    num_processes: int = 1,
) -> OutlinedRun:
    """The run of this config in outline.

    Args:
        progress: told (what, done, total) while dialogues are tokenised.
        num_processes: that the run is started on.
    Raises:
        LoraScriptsError: the model or the data cannot be used.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    require_inputs(config)
    # An older LoRA to go on from changes no shape, nor do those beneath, so none is read.
    settings = config.model_copy(update={"init_lora_weights": None})
    with FakeTensorMode(allow_non_fake_inputs=True):
        family = family_class(source.family).outline(source, config, device, dtype)
        adapter = attach_adapter(family, settings, Events())
    data = task_of(config).outline(family, device, progress)
    return OutlinedRun(adapter, data, Passes(config, family, adapter, data.train, device, num_processes))
