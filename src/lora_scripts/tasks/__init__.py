"""What a run on pictures and a run on dialogues do differently, and the table of both."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig
    from lora_scripts.tasks.protocol import Task

__all__ = ["TASKS", "require_inputs", "task_of"]

TASKS = {
    "text-to-image": "lora_scripts.tasks.text_to_image:TextToImage",
    "text-generation": "lora_scripts.tasks.text_generation:TextGeneration",
}


def require_inputs(config: RunConfig) -> None:
    """Looks at what the settings name (folders, a model that judges), which costs little and is done before all else.

    Raises:
        LoraScriptsError: something is not there, or not what it should be.
    """
    _class(config).require_inputs(config)


def task_of(config: RunConfig) -> Task:
    """The task of a run.

    Args:
        config: with all that is left to be chosen in it.
    """
    return _class(config)(config)


def _class(config: RunConfig) -> type[Task]:
    module, _, attribute = TASKS[config.task_type].partition(":")
    found: type[Task] = getattr(import_module(module), attribute)
    return found
