"""Dialogues, for a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache, cache_folder
from lora_scripts.data.split import Split, measured_on, split
from lora_scripts.dialogues.batches import DialogueBatches, dialogue_batches
from lora_scripts.dialogues.dialogue_set import DialogueSet
from lora_scripts.dialogues.opening import open_dialogues
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.tokenise import tokenise
from lora_scripts.errors import DataError
from lora_scripts.finish_language import FinishLanguage
from lora_scripts.preflight.before_run import tell_or_refuse
from lora_scripts.preflight.findings import Report
from lora_scripts.tasks.protocol import Finishing, Prepared, Previewing, Progress, Run

if TYPE_CHECKING:
    import torch

    from lora_scripts.families.protocol import LanguageFamily
    from lora_scripts.training.events import Events
    from lora_scripts.training.resume import Resumable

__all__ = ["TextGeneration"]

MOST_TOKENS = 2048
"""Of a dialogue, unless the config says otherwise."""


class TextGeneration:
    """A run on dialogues."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        if not config.train_data_dir.exists():
            raise DataError(
                f"train_data_dir: {config.train_data_dir}: no such folder or file. Put train.jsonl there, or correct the path."
            )
        self._max_length = 0
        self._data: DialogueBatches

    def prepare(
        self, family: LanguageFamily, device: torch.device, events: Events, progress: Progress, force: bool
    ) -> Prepared:
        """Dialogues: read, checked, and each turned into tokens once."""
        config = self._config
        self._max_length = config.max_length or min(MOST_TOKENS, family.most_tokens)
        for line in family.notes:
            events.note(line)
        if self._max_length > family.most_tokens:
            events.note(
                f"max_length: {self._max_length} is more than the {family.most_tokens} tokens that the model was made for.",
                "warning",
            )
        data = open_dialogues(
            config.train_data_dir,
            exclude=config.exclude,
            system_prompt=config.system_prompt,
            repeats=config.repeats,
        )
        for line in data.notes:
            events.note(line)
        template = ChatTemplate(family.tokenizer)
        cache = EncodingCache(cache_folder(config))

        def batches(rows: DialogueSet) -> DialogueBatches:
            tokens = tokenise(
                rows,
                template,
                max_length=self._max_length,
                train_on=config.train_on,
                cache=cache,
                progress=progress,
            )
            return dialogue_batches(rows, tokens, packed=family.packs)

        whole = batches(data.train)
        dev = batches(data.dev) if data.dev is not None else None
        for line in [*whole.dataset.notes, *whole.dataset.summary()]:
            events.note(line)
        if not whole.examples:
            raise DataError(
                f"train_data_dir: {config.train_data_dir}: no row has anything to learn:\n"
                + "\n".join(f"  {item.name}: {item.reason}" for item in whole.dataset.left_out[:20])
            )
        check = Report([], len(whole.examples), len(whole.examples) + len(whole.dataset.left_out))
        tell_or_refuse(check, config, events, force)
        parts: Split = (
            split(whole, config.validation_dialogues, config.words)
            if dev is None or not dev.examples
            else measured_on(whole, dev, config.validation_dialogues, config.words)
        )
        self._data = whole
        return Prepared(whole.dataset, parts, check)

    def facts(self) -> Sequence[tuple[str, str]]:
        examples = self._data.examples
        tokens, trained = sum(e.cost for e in examples), sum(e.tokens.num_trained for e in examples)
        longest = max(e.cost for e in examples)
        return [
            ("dialogues", f"{len(examples):,}, {tokens:,} tokens, {trained:,} of them learnt, the longest {longest:,}")
        ]

    def settings(self) -> dict[str, Any]:
        return {"max_length": self._max_length}

    def previews(self, run: Run) -> Previewing:
        from lora_scripts.answering.previews import AnswerPreviews

        return AnswerPreviews(run)

    def finishing(self, run: Run, previews: Previewing) -> Finishing:
        return FinishLanguage(run)

    def comparison(self, run: Run, run_state: Resumable, previews: Previewing) -> None:
        return None
