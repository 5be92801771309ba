"""The answers that a run shows of itself: to fixed prompts, beside what the base model says to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_scripts.answering.alarms import alarms
from lora_scripts.config import RunConfig
from lora_scripts.dialogues.answers import Answer, AnswerRequest
from lora_scripts.dialogues.conversation import Message
from lora_scripts.errors import DataError
from lora_scripts.families import num_parameters
from lora_scripts.previews import MOST_CPU_PARAMETERS
from lora_scripts.training.events import Answers
from lora_scripts.training.optimizers import evaluation_weights

if TYPE_CHECKING:
    from lora_scripts.data.training_data import TrainingData
    from lora_scripts.dialogues.conversation import Dialogue
    from lora_scripts.tasks.protocol import Run

__all__ = ["AnswerPreviews", "prompts_of", "written_prompt"]

MOST_PROMPTS = 4
BEGINNING = 120
"""Characters of a plain text that are given for the model to go on with."""


class AnswerPreviews:
    """Asks the model as it is and tells the listeners.

    Attributes:
        requests: the same at every step; empty when nothing is to be shown.
        expected: what the data answer to each, where it comes from there.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._told: set[int] = set()
        self._base: list[Answer] | None = None
        asked = _usable(_requests(run), run)
        self.requests: Sequence[AnswerRequest] = [request for request, _ in asked]
        self.expected = [expected for _, expected in asked]

    def render(self, step: int) -> None:
        if not self.requests:
            return
        run, base = self._run, self._base_answers()
        if step == 0 and run.config.init_lora_weights is None:
            answers = base  # a new adapter changes nothing
        else:
            with evaluation_weights(run.optimizer), run.adapter.strength(1.0):
                answers = run.family.answer(self.requests)
        told = alarms(base, answers, run.config.sample_tokens)
        prompts = [written_prompt(request) for request in self.requests]
        run.events.answered(Answers(step, prompts, base, answers, told, self.expected))
        self._told.add(step)

    def repeat(self, step: int) -> None:
        """Asks only where the step was not told of, because it lies between two previews."""
        if step not in self._told:
            self.render(step)

    def _base_answers(self) -> list[Answer]:
        """Once in a run: the base model stays as it is."""
        if self._base is None:
            with self._run.adapter.disabled():
                self._base = self._run.family.answer(self.requests)
        return self._base


def written_prompt(request: AnswerRequest) -> str:
    """A request for people: the question; where the dialogue began earlier, that too."""
    if not request.messages:
        return request.text
    spoken = [message for message in request.messages if message.role != "system"]
    if len(spoken) == 1:
        return spoken[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in spoken)


def prompts_of(data: TrainingData) -> list[tuple[AnswerRequest, str]]:
    """Up to four last questions spread over the data, each with the answer that the data give."""
    rows: dict[tuple[tuple[Message, ...], str], str] = {}
    for example in data.examples:
        asked, text, answer = _last_question(example.row)  # type: ignore[attr-defined]
        if asked or text:
            rows.setdefault((asked, text), answer)
    found = list(rows.items())
    number = min(MOST_PROMPTS, len(found))
    spread = [found[i * len(found) // number] for i in range(number)]
    return [(AnswerRequest(asked, text), answer) for (asked, text), answer in spread]


def _requests(run: Run) -> list[tuple[AnswerRequest, str]]:
    config = run.config
    if config.preview_every == 0:
        return []
    if config.sample_prompts:
        found = [(AnswerRequest(_as_question(config, prompt)), "") for prompt in config.sample_prompts]
    elif run.device.type == "cpu" and num_parameters(run.family) > MOST_CPU_PARAMETERS:
        return []  # a preview would take minutes
    else:
        parts = run.prepared.parts
        found = [*(prompts_of(parts.held_out) if parts.held_out is not None else ()), *prompts_of(parts.train)]
        found = found[:MOST_PROMPTS]
    # What is held out comes first: an answer that was learnt by heart says little.
    return [
        (replace(request, max_new_tokens=config.sample_tokens, seed=config.sample_seed + number), expected)
        for number, (request, expected) in enumerate(found)
    ]


def _usable(asked: list[tuple[AnswerRequest, str]], run: Run) -> list[tuple[AnswerRequest, str]]:
    """Those that the model can be asked; the others are named, for a preview is no reason to end a run."""
    from lora_scripts.answering.generate import Answerer

    answerer = Answerer(run.family.model, run.family.tokenizer) if asked else None
    usable = []
    for request, expected in asked:
        assert answerer is not None
        try:
            answerer.require_room(request)
        except DataError as error:
            run.events.note(f"The preview {_short(written_prompt(request))!r} is left out: {error}", "warning")
        else:
            usable.append((request, expected))
    return usable


def _as_question(config: RunConfig, prompt: str) -> tuple[Message, ...]:
    system = (Message("system", config.system_prompt),) if config.system_prompt else ()
    return (*system, Message("user", prompt))


def _last_question(row: Dialogue) -> tuple[tuple[Message, ...], str, str]:
    """The messages before the last answer, or the beginning of a plain text; and what the data go on with."""
    if not row.messages:
        begin = row.text[:BEGINNING]
        begin = begin.rpartition(" ")[0] or begin
        return (), begin, row.text[len(begin) : len(begin) + 2 * BEGINNING]
    last = max((i for i, message in enumerate(row.messages) if message.role == "assistant"), default=0)
    return row.messages[:last], "", row.messages[last].content


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
