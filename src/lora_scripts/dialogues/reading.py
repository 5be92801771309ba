"""From a config and a tokenizer to dialogues as tokens: what a run and the check of its data both begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_scripts.data.cache import EncodingCache, cache_folder
from lora_scripts.dialogues.batches import DialogueBatches, dialogue_batches
from lora_scripts.dialogues.formats import parse_row
from lora_scripts.dialogues.opening import open_dialogues
from lora_scripts.dialogues.pair_batches import pair_batches
from lora_scripts.dialogues.pairs import parse_pair, rejected_rows
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
        train: of `data.train`; of pairs the preferred answers.
        dev: of `data.dev`, where there is such a file.
        rejected, rejected_dev: of pairs the other answers.
    """

    data: DialogueData
    template: ChatTemplate
    train: TokenisedSet
    dev: TokenisedSet | None
    rejected: TokenisedSet | None = None
    rejected_dev: TokenisedSet | None = None

    def train_batches(self, packed: bool) -> DialogueBatches:
        """What trains, in memory."""
        return _batches(self.data.train, self.train, self.rejected, packed)

    def dev_batches(self, packed: bool) -> DialogueBatches | None:
        """What the run is measured on, where there is a file for that with a row of use."""
        if self.data.dev is None or self.dev is None or not self.dev.examples:
            return None
        return _batches(self.data.dev, self.dev, self.rejected_dev, packed)


def _batches(rows: DialogueSet, tokens: TokenisedSet, rejected: TokenisedSet | None, packed: bool) -> DialogueBatches:
    if rejected is None:
        return dialogue_batches(rows, tokens, packed=packed)
    return pair_batches(rows, tokens, rejected, packed=packed)


def require_dialogues(config: RunConfig) -> None:
    """Raises DataError when there is no such folder or file. Cheap, so it is asked before weights are read."""
    if not config.data_dir.exists():
        raise DataError(
            f"train_data_dir: {config.data_dir}: no such folder or file. Put train.jsonl there, or correct the path."
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
    pairs = config.objective != "sft"
    data = open_dialogues(
        config.data_dir,
        exclude=config.exclude,
        system_prompt=config.system_prompt,
        repeats=config.repeats,
        parse=parse_pair if pairs else parse_row,
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

    def others_of(rows: DialogueSet) -> TokenisedSet | None:
        return tokens_of(rejected_rows(rows)) if pairs else None

    train, rejected = tokens_of(data.train), others_of(data.train)
    if data.dev is None:
        return ReadDialogues(data, template, train, None, rejected)
    return ReadDialogues(data, template, train, tokens_of(data.dev), rejected, others_of(data.dev))
