"""What a run on pictures and a run on dialogues do differently, and the table of both."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig
    from lora_scripts.tasks.protocol import Task

__all__ = ["TASKS", "task_of"]

TASKS = {
    "text-to-image": "lora_scripts.tasks.text_to_image:TextToImage",
    "text-generation": "lora_scripts.tasks.text_generation:TextGeneration",
}


def task_of(config: RunConfig) -> Task:
    """The task of a run; what it costs to look at early (paths, a wrong name) is looked at now.

    Raises:
        LoraScriptsError: the data's folder is not there, or a setting names something that is not.
    """
    module, _, attribute = TASKS[config.task_type].partition(":")
    task: Task = getattr(import_module(module), attribute)(config)
    return task
