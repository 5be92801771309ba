"""Dialogues, for a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache, cache_folder
from lora_scripts.data.split import Split, measured_on, split
from lora_scripts.dialogues.batches import DialogueBatches
from lora_scripts.dialogues.checks import check_dialogues
from lora_scripts.dialogues.pair_batches import PairBatches
from lora_scripts.dialogues.reading import longest_allowed, read_dialogues, require_dialogues
from lora_scripts.dialogues.reference import with_reference
from lora_scripts.errors import DataError
from lora_scripts.finish_language import FinishLanguage
from lora_scripts.preflight.before_run import tell_or_refuse
from lora_scripts.tasks.protocol import DataOutline, Finishing, Prepared, Previewing, Progress, Run

if TYPE_CHECKING:
    import torch

    from lora_scripts.families.protocol import LanguageFamily
    from lora_scripts.training.events import Events
    from lora_scripts.training.resume import Resumable

__all__ = ["TextGeneration"]


class TextGeneration:
    """A run on dialogues."""

    @staticmethod
    def require_inputs(config: RunConfig) -> None:
        require_dialogues(config)

    def __init__(self, config: RunConfig) -> None:
        self._config = config
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
        self._require_examples(whole)  # however much it is forced
        if config.objective == "dpo":
            whole = self._with_reference(whole, family, device, progress)
            dev = dev and self._with_reference(dev, family, device, progress)
        self._data = whole
        return Prepared(whole.dataset, self._parts(whole, dev), check)

    def outline(self, family: LanguageFamily, device: torch.device, progress: Progress) -> DataOutline:
        """Dialogues by their lengths, which only the tokenizer knows; what it makes of them stays in the cache for the run."""
        chunks = _cached_chunks(self._config)
        read = read_dialogues(self._config, family.tokenizer, family.most_tokens, progress)
        how = "tokenised now, and kept for the run" if _cached_chunks(self._config) > chunks else "from the cache"
        whole = read.train_batches(family.packs)
        self._require_examples(whole)
        if isinstance(whole, PairBatches) and self._config.objective == "dpo":
            whole = replace(whole, reference={pair.name: (0.0, 0.0) for pair in whole.pairs})
        self._data = whole
        parts = self._parts(whole, read.dev_batches(family.packs))
        (what, lengths), *facts = self.facts()
        train = cast("DialogueBatches", parts.train)
        return DataOutline(
            train,
            [(what, f"{lengths}; {how}"), *facts],
            "tokens",
            parts.held_out is not None,
            lambda: _shorter(train),
        )

    def _require_examples(self, whole: DialogueBatches) -> None:
        if not whole.examples:
            raise DataError(
                f"train_data_dir: {self._config.data_dir}: no row has anything to learn:\n"
                + "\n".join(f"  {item.name}: {item.reason}" for item in whole.dataset.left_out[:20])
            )

    def _parts(self, whole: DialogueBatches, dev: DialogueBatches | None) -> Split:
        config = self._config
        if dev is None:
            return split(whole, config.validation_dialogues, config.words)
        return measured_on(whole, dev, config.validation_dialogues, config.words)

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


SHORTEST = 128
"""Tokens; below this a dialogue loses what it is about."""


def _shorter(data: DialogueBatches) -> Iterator[tuple[str, DialogueBatches]]:
    longest = max(sequence.cost for example in data.examples for sequence in example.sequences)
    length = 1 << (longest - 1).bit_length()
    while (length := length // 2) >= SHORTEST:
        shorter = data.cut_to(length)
        if shorter.examples:
            yield f"max_length: {length}", shorter


def _cached_chunks(config: RunConfig) -> int:
    return sum(1 for _ in (cache_folder(config) / "tokens").rglob("*.safetensors"))
