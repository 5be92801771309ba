"""A conversation in the terminal: what was said so far, who answers, and the commands that change it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

from lora_scripts.answering.generate import TooLongError
from lora_scripts.answering.voices import BASE, Voices
from lora_scripts.dialogues.answers import AnswerRequest
from lora_scripts.dialogues.conversation import Message
from lora_scripts.errors import DataError

__all__ = ["HELP", "Chat", "ChatSettings"]

HELP = """\
/lora NAME     let this LoRA answer (without a name: which there are)
/base          let the base model answer
/weight 0.7    how strongly the LoRA works
/side          base model and every LoRA side by side, on or off
/system TEXT   the system text (without a text: none); begins anew
/reset         forget what was said
/quit          end (Ctrl-D too); Ctrl-C stops an answer
Write // at the beginning of a line to say something that begins with /."""


@dataclass
class ChatSettings:
    """What can be changed while talking.

    Attributes:
        who: answers, and goes on with the dialogue: a LoRA's name or `BASE`.
        side_by_side: the others answer the same question too.
    """

    who: str = BASE
    weight: float = 1.0
    side_by_side: bool = False
    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42


class Chat:
    """One conversation; `take` gets it line by line."""

    def __init__(
        self, voices: Voices, settings: ChatSettings, out: TextIO, notes: TextIO | None = None, *, labels: bool
    ) -> None:
        """Args:
        out: gets the answers.
        notes: gets everything else; the same by default.
        labels: put the speaker's name before an answer, also where there is but one.
        """
        self._voices, self.settings, self._labels = voices, settings, labels
        self._out, self._notes = out, notes or out
        self._said: list[Message] = []
        self._turns = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/lora": self._lora,
            "/base": lambda rest: self._let(BASE),
            "/weight": self._weight,
            "/side": lambda rest: self._side(),
            "/system": self._system,
            "/reset": lambda rest: self._reset(),
            "/help": lambda rest: self._tell(HELP),
        }

    def take(self, line: str) -> bool:
        """Answers a question or does what a command says; False when the conversation is over."""
        line = line.strip()
        if line in ("/quit", "/exit"):
            return False
        if line.startswith("//"):
            self._ask(line[1:])
        elif line.startswith("/"):
            word, _, rest = line.partition(" ")
            command = self._commands.get(word)
            if command is None:
                self._tell(f"{word}: no such command.\n{HELP}")
            else:
                command(rest.strip())
        elif line:
            self._ask(line)
        return True

    # Answers -----------------------------------------------------------------------------------------------------------

    def _ask(self, question: str) -> None:
        self._said.append(Message("user", question))
        self._turns += 1
        speakers = self._speakers()
        answer = ""
        try:
            for who in speakers:
                said = self._answer(who, labelled=self._labels or len(speakers) > 1)
                answer = said if who == self.settings.who else answer
        except DataError as error:
            self._said.pop()
            self._tell(str(error))
            return
        except KeyboardInterrupt:
            self._end_answer("[stopped]")
        if answer:
            self._said.append(Message("assistant", answer))
        else:
            self._said.pop()  # nothing to go on with: two questions in a row would not be a dialogue

    def _speakers(self) -> list[str]:
        settings = self.settings
        return [BASE, *self._voices.names] if settings.side_by_side else [settings.who]

    def _answer(self, who: str, *, labelled: bool) -> str:
        """What one of them says, written as it comes; as far as it came where the user stops it."""
        pieces: list[str] = []

        def write(piece: str) -> None:
            pieces.append(piece)
            self._out.write(piece)
            self._out.flush()

        if labelled:
            self._out.write(f"{who}> ")
            self._out.flush()
        try:
            answer = self._voices.answer(who, self._request(who), self.settings.weight, write)
        except KeyboardInterrupt:
            if who == self.settings.who and pieces:
                self._end_answer("[stopped]")
                return "".join(pieces)
            raise
        self._end_answer("" if answer.ended else f"[cut off at {answer.num_tokens} tokens]")
        return answer.text

    def _request(self, who: str) -> AnswerRequest:
        """The dialogue up to now; where the model cannot read all of it, without the first turns."""
        settings = self.settings
        system = (Message("system", settings.system),) if settings.system else ()
        request = AnswerRequest(
            (*system, *self._said),
            "",
            settings.max_new_tokens,
            settings.temperature,
            settings.top_p,
            settings.seed + self._turns - 1,
        )
        while len(self._said) > 1:
            try:
                self._voices.require_room(who, request)
                break
            except TooLongError:
                del self._said[:2]
                self._tell("[the first turns no longer fit and are forgotten]")
                request = replace(request, messages=(*system, *self._said))
        return request

    # Commands ----------------------------------------------------------------------------------------------------------

    def _lora(self, name: str) -> None:
        names = self._voices.names
        if name in names:
            self._let(name)
        elif not names:
            self._tell("No LoRA was given. Start again with --lora FOLDER.")
        else:
            self._tell(f"{f'{name}: no such LoRA. ' if name else ''}There are: {', '.join(names)}.")

    def _let(self, who: str) -> None:
        self.settings.who, self.settings.side_by_side = who, False
        self._tell("The base model answers." if who == BASE else f"{who} answers, weight {self.settings.weight:g}.")

    def _weight(self, text: str) -> None:
        try:
            weight = float(text)
        except ValueError:
            self._tell("Write a number, such as /weight 0.7.")
            return
        if not -10 <= weight <= 10:  # also what is not a number
            self._tell("The weight must be between -10 and 10.")
            return
        self.settings.weight = weight
        self._tell(f"Weight {weight:g}.")

    def _side(self) -> None:
        self.settings.side_by_side = not self.settings.side_by_side
        self._tell("Side by side." if self.settings.side_by_side else f"{self.settings.who} answers alone.")

    def _system(self, text: str) -> None:
        self.settings.system = text
        self._said.clear()
        self._tell("A new conversation with this system text." if text else "A new conversation without a system text.")

    def _reset(self) -> None:
        self._said.clear()
        self._tell("Forgotten; a new conversation.")

    def _end_answer(self, remark: str) -> None:
        self._out.write("\n")
        self._out.flush()
        if remark:
            self._tell(remark)

    def _tell(self, text: str) -> None:
        self._notes.write(text + "\n")
        self._notes.flush()

    @property
    def said(self) -> Sequence[Message]:
        """Questions and answers that the next one follows."""
        return tuple(self._said)
