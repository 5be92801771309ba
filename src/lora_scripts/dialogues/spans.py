"""A dialogue as text, with the stretches of characters that are learnt.

Found by rendering the real template turn by turn: an answer is what lies between the text that asks for it and the text after
it. At inference the template asks with the very same text, so what is learnt is what has to be written then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_scripts.dialogues.conversation import Dialogue, Message
from lora_scripts.dialogues.formats import RowError
from lora_scripts.dialogues.template import ChatTemplate, TemplateRefusal, fold_system

__all__ = ["FOLDED", "NO_END", "REWRITES", "Rendered", "TrainOn", "render_row"]

TrainOn = Literal["assistant", "all"]
"""Whose words are learnt: the assistant's, or everybody's."""

FOLDED = "the chat template takes no system text, which was put in front of the first question instead"
REWRITES = "the chat template rewrites earlier turns, so that each answer became an example of its own, as at inference"
NO_END = (
    "the chat template ends no answer, so that each became an example of its own, with the end-of-text token after it"
)
ASKS_OTHERWISE = (
    "the chat template asks for an answer in another way than it writes one; answers are learnt as it writes them"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as text.

    Attributes:
        spans: begin and end of what is learnt, in characters, in order.
        suffix: tells the examples of one row apart (` answer 2`); empty where there is one.
        splits: whether a text that is too long may become several examples.
        remarks: what was done in an unusual way.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    suffix: str = ""
    splits: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer of the assistant as the last turn of a text.

    Attributes:
        text: all up to its end, without white space after that.
        begin: where it begins; it ends where the text ends.
        ended: whether the template wrote the end.
        number: from 1, among the row's answers.
    """

    text: str
    begin: int
    ended: bool
    number: int


def render_row(template: ChatTemplate, row: Dialogue, train_on: TrainOn) -> list[Rendered]:
    """The examples of a row: one, or one per answer where only that shows the model what it will see.

    Raises:
        RowError: the template refuses the row, or nothing of it is to be learnt.
    """
    if not row.messages:
        text = template.bos + row.text + template.eos
        return [Rendered(text, ((len(template.bos), len(text)),), splits=True)]
    messages = row.messages
    if any(message.role == "tool" for message in messages) and not template.writes_tool:
        raise RowError("has results of tools, which the chat template cannot write")
    examples = _everything if train_on == "all" else _answers
    has_system = any(message.role == "system" for message in messages)
    try:
        if not has_system or template.writes_system:
            try:
                return examples(template, messages, [])
            except TemplateRefusal:
                if not has_system:
                    raise
        return examples(template, fold_system(messages), [FOLDED])
    except TemplateRefusal as refusal:
        raise RowError(f"the chat template refuses it: {refusal}") from None


def _everything(template: ChatTemplate, messages: Sequence[Message], remarks: list[str]) -> list[Rendered]:
    text = template.render(messages).rstrip()
    if not (template.end_of_turn and text.endswith(template.end_of_turn)):
        text += template.eos
    return [Rendered(text, ((0, len(text)),), remarks=tuple(remarks))]


def _answers(template: ChatTemplate, messages: Sequence[Message], remarks: list[str]) -> list[Rendered]:
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    answers = [
        _answer(template, messages[: place + 1], number, remarks)
        for number, place in enumerate(places, start=1)
        if messages[place].trained
    ]
    if not answers:
        raise RowError("every answer is marked as not to be learnt (weight 0)")
    whole = answers[-1]
    if len(answers) == 1:
        return [Rendered(whole.text, ((whole.begin, len(whole.text)),), remarks=tuple(remarks))]
    if all(answer.ended and whole.text.startswith(answer.text) for answer in answers):
        spans = tuple((answer.begin, len(answer.text)) for answer in answers)
        return [Rendered(whole.text, spans, remarks=tuple(remarks))]
    remarks.append(REWRITES if all(answer.ended for answer in answers) else NO_END)
    return [
        Rendered(answer.text, ((answer.begin, len(answer.text)),), f" answer {answer.number}", remarks=tuple(remarks))
        for answer in answers
    ]


def _answer(template: ChatTemplate, turns: Sequence[Message], number: int, remarks: list[str]) -> _Answer:
    """The last of the turns as an answer to those before it."""
    asked = template.render(turns[:-1], ask=True) if len(turns) > 1 else ""
    text = template.render(turns)
    begin = len(asked)
    # Without earlier turns there is no text that asks: some templates fail on an empty list, others write only the opening.
    if not asked or not text.startswith(asked):
        begin = template.content_begins(turns)
        if begin < 0:
            raise RowError(f"the chat template leaves out answer {number}")
        if asked and ASKS_OTHERWISE not in remarks:
            remarks.append(ASKS_OTHERWISE)
    text = text.rstrip()
    ended = bool(template.end_of_turn) and text.endswith(template.end_of_turn)
    if begin >= len(text):
        raise RowError(f"the chat template leaves out answer {number}")
    return _Answer(text if ended else text + template.eos, begin, ended, number)
