"""Dialogues, for a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache, cache_folder
from lora_scripts.data.split import measured_on, split
from lora_scripts.dialogues.batches import DialogueBatches
from lora_scripts.dialogues.checks import check_dialogues
from lora_scripts.dialogues.pair_batches import PairBatches
from lora_scripts.dialogues.reading import longest_allowed, read_dialogues, require_dialogues
from lora_scripts.dialogues.reference import with_reference
from lora_scripts.errors import DataError
from lora_scripts.finish_language import FinishLanguage
from lora_scripts.preflight.before_run import tell_or_refuse
from lora_scripts.tasks.protocol import Finishing, Prepared, Previewing, Progress, Run

if TYPE_CHECKING:
    import torch

    from lora_scripts.families.protocol import LanguageFamily
    from lora_scripts.training.events import Events
    from lora_scripts.training.resume import Resumable

__all__ = ["TextGeneration"]


class TextGeneration:
    """A run on dialogues."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        require_dialogues(config)
        self._max_length = 0
        self._data: DialogueBatches

    def prepare(
        self, family: LanguageFamily, device: torch.device, events: Events, progress: Progress, force: bool
    ) -> Prepared:
        """Dialogues: read, each turned into tokens once, and checked."""
        config = self._config
        self._max_length = longest_allowed(config, family.most_tokens)
        for line in family.notes:
            events.note(line)
        if self._max_length > family.most_tokens:
            events.note(
                f"max_length: {self._max_length} is more than the {family.most_tokens} tokens that the model was made for.",
                "warning",
            )
        read = read_dialogues(config, family.tokenizer, family.most_tokens, progress)
        data = read.data
        for line in data.notes:
            events.note(line)
        whole, dev = read.train_batches(family.packs), read.dev_batches(family.packs)
        for line in [*whole.dataset.notes, *whole.dataset.summary()]:
            events.note(line)
        check = check_dialogues(data, read.train, read.template)
        tell_or_refuse(check, config, events, force)
        if not whole.examples:  # however much it is forced
            raise DataError(
                f"train_data_dir: {config.train_data_dir}: no row has anything to learn:\n"
                + "\n".join(f"  {item.name}: {item.reason}" for item in whole.dataset.left_out[:20])
            )
        if config.objective == "dpo":
            whole = self._with_reference(whole, family, device, progress)
            dev = dev and self._with_reference(dev, family, device, progress)
        self._data = whole
        if dev is None:
            return Prepared(whole.dataset, split(whole, config.validation_dialogues, config.words), check)
        return Prepared(whole.dataset, measured_on(whole, dev, config.validation_dialogues, config.words), check)

    def _with_reference(
        self, data: DialogueBatches, family: LanguageFamily, device: torch.device, progress: Progress
    ) -> DialogueBatches:
        """The pairs with what the model makes of them before training."""
        assert isinstance(data, PairBatches)
        config, cache = self._config, EncodingCache(cache_folder(self._config))
        return with_reference(
            data,
            family,
            family.fingerprint,
            batch_size=config.micro_batch,
            device=device,
            cache=cache,
            progress=progress,
        )

    def facts(self) -> Sequence[tuple[str, str]]:
        examples = self._data.examples
        tokens, trained = sum(e.cost for e in examples), sum(e.num_trained for e in examples)
        longest = max(e.cost for e in examples)
        quantization, objective = self._config.quantization, self._config.objective
        return [
            ("dialogues", f"{len(examples):,}, {tokens:,} tokens, {trained:,} of them learnt, the longest {longest:,}"),
            *([("objective", f"{objective}, beta {self._config.preference_beta:g}")] if objective != "sft" else []),
            *([("weights", f"held in {quantization}, head and embeddings not")] if quantization != "none" else []),
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
