"""From a config and a tokenizer to dialogues as tokens: what a run and the check of its data both begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_scripts.data.cache import EncodingCache, cache_folder
from lora_scripts.dialogues.opening import open_dialogues
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.tokenise import tokenise
from lora_scripts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_scripts.config import RunConfig
    from lora_scripts.dialogues.dialogue_set import DialogueData, DialogueSet
    from lora_scripts.dialogues.tokenised_set import TokenisedSet

__all__ = ["ReadDialogues", "longest_allowed", "read_dialogues", "require_dialogues"]

MOST_TOKENS = 2048
"""Of a dialogue, unless the config says otherwise."""


@dataclass(frozen=True)
class ReadDialogues:
    """Rows and what they became.

    Attributes:
        train: of `data.train`.
        dev: of `data.dev`, where there is such a file.
    """

    data: DialogueData
    template: ChatTemplate
    train: TokenisedSet
    dev: TokenisedSet | None


def require_dialogues(config: RunConfig) -> None:
    """Raises DataError when there is no such folder or file. Cheap, so it is asked before weights are read."""
    if not config.train_data_dir.exists():
        raise DataError(
            f"train_data_dir: {config.train_data_dir}: no such folder or file. Put train.jsonl there, or correct the path."
        )


def longest_allowed(config: RunConfig, most_tokens: int) -> int:
    """Tokens of the longest dialogue: the config's `max_length`, else 2048 or what the model was made for."""
    return config.max_length or min(MOST_TOKENS, most_tokens)


def read_dialogues(
    config: RunConfig,
    tokenizer: Any,
    most_tokens: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ReadDialogues:
    """Reads and tokenises what the config names; what was tokenised before comes from the cache.

    Args:
        most_tokens: what the model was made for.
        progress: told (what, done, total); may raise to stop.
    Raises:
        DataError: nothing is there, more than a tenth of the rows cannot be read, or none is left.
        ModelError: the tokenizer's chat template cannot be used.
    """
    require_dialogues(config)
    data = open_dialogues(
        config.train_data_dir, exclude=config.exclude, system_prompt=config.system_prompt, repeats=config.repeats
    )
    template = ChatTemplate(tokenizer)
    cache = EncodingCache(cache_folder(config))

    def tokens_of(rows: DialogueSet) -> TokenisedSet:
        return tokenise(
            rows,
            template,
            max_length=longest_allowed(config, most_tokens),
            train_on=config.train_on,
            cache=cache,
            progress=progress,
        )

    return ReadDialogues(data, template, tokens_of(data.train), tokens_of(data.dev) if data.dev is not None else None)
