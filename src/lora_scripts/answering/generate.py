"""Answers of a language model: its own chat template asks, transformers' `generate` answers with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_scripts.answering.pieces import Pieces
from lora_scripts.dialogues.answers import Answer, AnswerRequest
from lora_scripts.dialogues.template import ChatTemplate, TemplateRefusal, fold_system
from lora_scripts.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_scripts.dialogues.conversation import Message

__all__ = ["Answerer", "TooLongError", "answer"]


class TooLongError(DataError):
    """The prompt leaves no room for an answer."""


class Answerer:
    """Asks one model; what it says depends on the weights and the request alone.

    Recommendations that lie beside the model (a temperature, a repetition penalty) are not followed: they would hide what
    training did.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Raises:
        ModelError: the tokenizer's chat template cannot be used, or nothing could end an answer.
        """
        self._model, self._tokenizer = model, tokenizer
        self.template = ChatTemplate(tokenizer)
        self._stops = _stop_tokens(model, tokenizer, self.template)

    def answer(self, request: AnswerRequest, on_text: Callable[[str], None] | None = None) -> Answer:
        """The answer to one request.

        The model is left as it was: its modes, gradient checkpointing and the random numbers of whoever trains it.

        Args:
            on_text: told the text piece by piece as it comes; the pieces together are the answer's text. What it raises
                ends the answer, as Ctrl-C does.
        Raises:
            TooLongError: the prompt alone fills what the model can read.
            DataError: the chat template refuses the messages.
        """
        import torch

        tokens = torch.tensor([self._tokens(request)], device=self._model.device)
        room = self._room(tokens.shape[1])
        pieces = Pieces(self._tokenizer, self._stops, on_text, stripped=bool(request.messages))
        with _in_use(self._model), _own_draws(request, self._model.device):
            self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=self._generation(request, min(request.max_new_tokens, room)),
                streamer=pieces,
            )
        return Answer(pieces.text, pieces.ended, pieces.num_tokens)

    def require_room(self, request: AnswerRequest) -> None:
        """Raises DataError where `answer` would: the prompt is too long, or the chat template refuses it."""
        self._room(len(self._tokens(request)))

    def prompt(self, request: AnswerRequest) -> str:
        """The text that the model goes on with; a system text goes into the first question where the template has no place.

        Raises:
            DataError: the chat template refuses the messages.
        """
        if not request.messages:
            return self.template.bos + request.text
        try:
            return self._render(request.messages)
        except TemplateRefusal as refusal:
            raise DataError(f"the chat template refuses the messages: {refusal}") from None

    def _render(self, messages: Sequence[Message]) -> str:
        if self.template.writes_system:
            try:
                return self.template.render(messages, ask=True)
            except TemplateRefusal:  # it may take no system text in the middle
                if all(message.role != "system" for message in messages):
                    raise
        return self.template.render(fold_system(messages), ask=True)

    def _tokens(self, request: AnswerRequest) -> list[int]:
        encoded = self._tokenizer(self.prompt(request), add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def _room(self, num_tokens: int) -> int:
        config = self._model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and num_tokens >= most:
            raise TooLongError(f"the prompt has {num_tokens:,} tokens, and the model reads {most:,}. Shorten it.")
        return most - num_tokens if most is not None else 1 << 30

    def _generation(self, request: AnswerRequest, max_new_tokens: int) -> Any:
        from transformers import GenerationConfig

        drawn = {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0} if request.temperature else {}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=bool(request.temperature),
            eos_token_id=self._stops,
            pad_token_id=self._stops[0],
            use_cache=True,
            **drawn,
        )


def answer(
    model: PreTrainedModel, tokenizer: Any, request: AnswerRequest, on_text: Callable[[str], None] | None = None
) -> Answer:
    """One answer; `Answerer` is quicker for several."""
    return Answerer(model, tokenizer).answer(request, on_text)


def _stop_tokens(model: PreTrainedModel, tokenizer: Any, template: ChatTemplate) -> list[int]:
    """Every token after which the model has said all: of its generation config, its tokenizer and its template."""
    named = getattr(model.generation_config, "eos_token_id", None)
    stops = [*named] if isinstance(named, list | tuple) else [named]
    stops.append(tokenizer.eos_token_id)
    if template.end_of_turn:
        stops.append(tokenizer.convert_tokens_to_ids(template.end_of_turn))
    return list(dict.fromkeys(int(stop) for stop in stops if stop is not None))


@contextmanager
def _in_use(model: PreTrainedModel) -> Iterator[None]:
    """Within the block nothing is in training mode, and no recommendation of the model's makers is in force."""
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    recommended = model.generation_config
    for module in training:  # checkpointed layers too: they would do without the cache
        module.training = False
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = recommended
        for module in training:
            module.training = True


@contextmanager
def _own_draws(request: AnswerRequest, device: Any) -> Iterator[None]:
    """Within the block random numbers come from the request's seed; those outside go on as if nothing had been drawn."""
    import torch

    if not request.temperature:
        yield
        return
    accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
    place = () if device.type in ("cpu", "mps") else (device,)
    before, before_there = torch.get_rng_state(), accelerator.get_rng_state(*place) if accelerator else None
    torch.manual_seed(request.seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if accelerator:
            accelerator.set_rng_state(before_there, *place)
