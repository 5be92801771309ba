"""The tokenizer's own chat template, or a plain one where it has none, and what can be relied on about it.

Nothing is known beforehand about how a template marks its turns: what it does is found by rendering.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lora_scripts.dialogues.conversation import Message
from lora_scripts.errors import ModelError

__all__ = ["CHATML", "PLAIN", "ChatTemplate", "TemplateRefusal", "fold_system"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% elif message['role'] == 'tool' %}Tool: {{ message['content'] }}\n"
    "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_BOS = "{{ bos_token }}"
_PROBE = "\ue000probe\ue000"
"""Private-use characters: no data and no template holds them."""


class TemplateRefusal(Exception):  # noqa: N818  it is no error of the program: templates refuse by raising
    """The template raised for these messages; the text is its own."""


class ChatTemplate:
    """How a dialogue becomes text for one tokenizer.

    Attributes:
        source: the Jinja text; to be saved beside an adapter.
        is_own: whether it came with the tokenizer.
        end_of_turn: what it writes after an answer to end it, such as `<|im_end|>`; empty where it writes nothing.
        writes_system, writes_tool: whether a message of that role appears in the text at all.
        bos: what the tokenizer puts before plain text, or an empty string.
        eos: its end-of-text token, or an empty string.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Finds out what the tokenizer's template does.

        Args:
            tokenizer: a transformers tokenizer that gives offsets (a fast one).
        Raises:
            ModelError: the tokenizer gives no offsets, its template cannot be used, or nothing could end an answer.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer ({type(tokenizer).__name__}) cannot say which text a token comes from. "
                "Save the model's folder with a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...))."
            )
        self.tokenizer = tokenizer
        self.eos: str = tokenizer.eos_token or ""
        self.bos = _bos(tokenizer)
        self.is_own = bool(tokenizer.chat_template)
        self.source: str = tokenizer.get_chat_template() if self.is_own else self._default()
        self.writes_system = self._appears("system")
        self.writes_tool = self._appears("tool")
        self.end_of_turn = self._find_end()

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any text could become other tokens: vocabulary, merges, special tokens, template."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # How the last caller wanted its batch cut or padded is no property of the tokenizer.
        backend.pop("truncation", None)
        backend.pop("padding", None)
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        whole = json.dumps([backend, self.source, special, self.bos, self.eos], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()

    @property
    def special_tokens(self) -> list[str]:
        """Texts that the tokenizer takes for marks of the template, wherever they stand."""
        return sorted(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)

    @property
    def note(self) -> str:
        """One sentence about where the template comes from, for people."""
        if self.is_own:
            return "Dialogues are written with the tokenizer's own chat template."
        shape = "ChatML (<|im_start|>, <|im_end|>)" if self._has_chatml() else "plain User: / Assistant: lines"
        return f"The tokenizer has no chat template; dialogues are written as {shape}."

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The text of the messages; with `ask` it ends where the assistant is to begin.

        Raises:
            TemplateRefusal: the template raises for these messages.
        """
        from jinja2.exceptions import TemplateError

        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                rows, chat_template=self.source, tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise TemplateRefusal(str(error).strip() or type(error).__name__) from None
        return str(text)

    def content_begins(self, messages: Sequence[Message]) -> int:
        """Where in the text the last message's content would begin, found with another content in its place; -1: nowhere."""
        probed = [*messages[:-1], Message(messages[-1].role, _PROBE)]
        return self.render(probed).find(_PROBE)

    def _default(self) -> str:
        return (_BOS if self.bos else "") + (CHATML if self._has_chatml() else PLAIN)

    def _has_chatml(self) -> bool:
        vocabulary = self.tokenizer.get_vocab()
        return "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary

    def _appears(self, role: str) -> bool:
        """Whether a message of that role leaves a trace; a template that ignores it does so in silence."""
        question, answer = Message("user", "a"), Message("assistant", "b")
        probe = Message("system", _PROBE) if role == "system" else Message("tool", _PROBE)
        turns = [probe, question, answer] if role == "system" else [question, answer, probe, answer]
        try:
            return _PROBE in self.render(turns)
        except TemplateRefusal:
            return False

    def _find_end(self) -> str:
        turns = [Message("user", "a"), Message("assistant", _PROBE)]
        try:
            text = self.render(turns)
        except TemplateRefusal as error:
            raise ModelError(
                f"the chat template of the tokenizer cannot write a question and its answer: {error}. "
                "Put a working chat_template.jinja into the model's folder."
            ) from None
        _, found, after = text.partition(_PROBE)
        if not found:
            raise ModelError(
                "the chat template of the tokenizer leaves answers out of the text, so none can be learnt."
            )
        end = after.strip()
        # Only a token of its own says "over"; ordinary text, or the opening of a next turn, does not.
        token = max((t for t in _own_tokens(self.tokenizer) if end.startswith(t)), key=len, default="")
        if not token and not self.eos:
            raise ModelError(
                "neither the chat template nor the tokenizer has a token that ends an answer, so no answer would ever "
                "end. Set eos_token in the tokenizer's tokenizer_config.json."
            )
        return token


def fold_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with every system text put in front of the question after it."""
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.role == "system":
            waiting.append(message.content)
        elif waiting and message.role == "user":
            folded.append(Message("user", "\n\n".join([*waiting, message.content])))
            waiting = []
        else:
            if waiting:
                folded.append(Message("user", "\n\n".join(waiting)))
                waiting = []
            folded.append(message)
    return tuple(folded)


def _bos(tokenizer: Any) -> str:
    """The beginning token where the tokenizer puts it before any text by itself."""
    ids = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if tokenizer.bos_token and ids and ids[0] == tokenizer.bos_token_id else ""


def _own_tokens(tokenizer: Any) -> list[str]:
    """The texts that always are one token of their own: special and added ones."""
    return [str(token) for token in tokenizer.get_added_vocab() if str(token).strip()]
