"""What a program that serves the model must get right besides the weights: the prompt's form, and where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.dialogues.conversation import Message
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.export.peft_folder import TOKENIZER_FILES
from lora_scripts.models.language_model import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PromptFacts", "probe_ids", "prompt_facts", "read_tokenizer"]

QUESTION = "My parcel has not arrived. What can I do?"
_RANDOM_LENGTH = 16


@dataclass(frozen=True)
class PromptFacts:
    """How a dialogue is written for a model.

    Attributes:
        rendered: an example question by the chat template, up to where the answer begins; empty without a template.
        stop_tokens: what ends an answer, by the model's generation settings and its tokenizer.
        answer_end: the token that the template ends an answer with; empty where it writes none.
    """

    rendered: str
    stop_tokens: Sequence[str]
    answer_end: str

    def lines(self) -> list[str]:
        """For the terminal."""
        stops = ", ".join(self.stop_tokens) or "none is set: answers run on until they are cut"
        if not self.rendered:
            return ["Prompt: no chat template, the model is given plain text", f"Stop tokens: {stops}"]
        shown = self.rendered.replace("\n", "\\n")
        lines = [f"Prompt of an example: {shown}", f"Stop tokens: {stops}"]
        if self.answer_end and self.answer_end not in self.stop_tokens:
            lines.append(
                f"Note: the template ends an answer with {self.answer_end!r}, which is no stop token of this model. Set it as "
                "a stop text where you serve it, or answers will not end."
            )
        return lines


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None where the folder has none.

    Raises:
        ModelError: it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return load_tokenizer(folder, str(folder))


def prompt_facts(tokenizer: Any, model_folder: Path) -> PromptFacts:
    """How an example is written, and which tokens end an answer.

    Args:
        tokenizer: of transformers, or None.
        model_folder: where generation_config.json or config.json names the tokens that end an answer.
    """
    if tokenizer is None:
        return PromptFacts("", [], "")
    stops = [tokenizer.convert_ids_to_tokens(number) for number in _stop_ids(tokenizer, model_folder)]
    if not tokenizer.chat_template:
        return PromptFacts("", stops, "")
    template = ChatTemplate(tokenizer)
    return PromptFacts(template.render([Message("user", QUESTION)], ask=True), stops, template.end_of_turn)


def probe_ids(tokenizer: Any, vocabulary: int) -> Tensor:
    """[1, L] token ids that models are compared on: the example's prompt, or fixed random ones without a tokenizer."""
    import torch

    if tokenizer is not None:
        text = QUESTION
        if tokenizer.chat_template:
            text = ChatTemplate(tokenizer).render([Message("user", QUESTION)], ask=True)
        ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1 and int(ids.max()) < vocabulary:
            return ids
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, _RANDOM_LENGTH), generator=generator)


def _stop_ids(tokenizer: Any, model_folder: Path) -> list[int]:
    from transformers import GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(model_folder, local_files_only=True).eos_token_id
    except OSError:
        named = None
    ids = list(named) if isinstance(named, list | tuple) else [named]
    return [number for number in dict.fromkeys([*ids, tokenizer.eos_token_id]) if number is not None]
