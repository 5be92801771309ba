"""Which questions a run asks itself."""

from __future__ import annotations

from helpers.tiny_causal_lms import tokenizer
from lora_scripts.answering.previews import prompts_of, written_prompt
from lora_scripts.dialogues.answers import AnswerRequest
from lora_scripts.dialogues.batches import DialogueBatches, dialogue_batches
from lora_scripts.dialogues.conversation import Dialogue, Message
from lora_scripts.dialogues.dialogue_set import DialogueSet
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.tokenise import tokenise


def data(*rows: Dialogue) -> DialogueBatches:
    tokens = tokenise(DialogueSet(rows), ChatTemplate(tokenizer()), max_length=64)
    return dialogue_batches(DialogueSet(rows), tokens, packed=True)


def dialogue(number: int, *messages: Message, text: str = "") -> Dialogue:
    return Dialogue(f"train.jsonl:{number}", messages, text, f"{number:064x}")


def pair(number: int) -> Dialogue:
    return dialogue(number, Message("user", f"How much is {number}?"), Message("assistant", f"It is {number}."))


def test_four_questions_are_spread_over_the_data_with_their_answers() -> None:
    found = prompts_of(data(*map(pair, range(8))))
    assert [(request.messages[-1].content, expected) for request, expected in found] == [
        (f"How much is {number}?", f"It is {number}.") for number in (0, 2, 4, 6)
    ]


def test_same_question_is_asked_once_and_few_are_all_asked() -> None:
    found = prompts_of(data(pair(1), pair(1), pair(2)))
    assert [request.messages[-1].content for request, _ in found] == ["How much is 1?", "How much is 2?"]


def test_dialogue_is_asked_up_to_its_last_answer() -> None:
    turns = [Message("system", "Short."), Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "And?")]
    ((request, expected),) = prompts_of(data(dialogue(1, *turns, Message("assistant", "No."))))
    assert (request.messages, expected) == (tuple(turns), "No.")
    assert written_prompt(request) == "user: Hi\nassistant: Ho\nuser: And?"


def test_plain_text_is_begun_at_a_whole_word() -> None:
    text = "word " * 60
    ((request, expected),) = prompts_of(data(dialogue(1, text=text)))
    assert request.messages == ()
    assert text.startswith(request.text + expected)
    assert request.text.endswith("word")
    assert len(request.text) <= 120
    assert written_prompt(request) == request.text


def test_dialogue_that_the_assistant_begins_asks_nothing() -> None:
    assert prompts_of(data(dialogue(1, Message("assistant", "Hello!")))) == []


def test_a_single_question_is_shown_as_it_is() -> None:
    asked = (Message("system", "Be kind."), Message("user", "Where is it?"))
    assert written_prompt(AnswerRequest(asked)) == "Where is it?"
