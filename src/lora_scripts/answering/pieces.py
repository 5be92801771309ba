"""Tokens become text as they come, without a character ever being shown in halves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

__all__ = ["Pieces"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """The text of an answer while its tokens arrive; in the shape that transformers' `generate` takes as `streamer`.

    A character of several bytes may be several tokens: a piece is given out when all of it is there. White space at the
    end waits until something follows.

    Attributes:
        text: all that was given out so far.
        num_tokens: of the answer, its end mark included.
        ended: whether an end mark came.
    """

    def __init__(
        self, tokenizer: Any, stops: Collection[int], on_text: Callable[[str], None] | None, stripped: bool
    ) -> None:
        """Args:
        stops: tokens that end the answer; they are no part of its text.
        on_text: told every piece; what it raises ends the answer.
        stripped: leave out white space before and after the answer.
        """
        self._tokenizer, self._stops, self._on_text, self._stripped = tokenizer, stops, on_text, stripped
        self._tokens: list[int] = []
        self._shown_from = self._shown_to = (
            0  # tokens whose text is out; the last of them are decoded with what follows
        )
        self._blank = ""
        self._prompt_came = False
        self.text = ""
        self.num_tokens = 0
        self.ended = False

    def put(self, tokens: Any) -> None:
        """Takes the prompt first, then each token."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        for token in tokens.reshape(-1).tolist():
            self.num_tokens += 1
            if token in self._stops:
                self.ended = True
            else:
                self._tokens.append(token)
                self._show()

    def end(self) -> None:
        """What is left of a character that never became whole is dropped."""
        if self._blank and not self._stripped:
            self._give(self._blank)

    def _show(self) -> None:
        # Some tokenizers decode a word differently at the beginning of a text: the last tokens shown go along each time.
        known = self._decode(self._tokens[self._shown_from : self._shown_to])
        new = self._decode(self._tokens[self._shown_from :])
        if len(new) <= len(known) or new.endswith(_UNFINISHED):
            return
        self._shown_from, self._shown_to = self._shown_to, len(self._tokens)
        piece = self._blank + new[len(known) :]
        if self._stripped and not self.text:
            piece = piece.lstrip()
        shown = piece.rstrip()
        self._blank = piece[len(shown) :]
        if shown:
            self._give(shown)

    def _give(self, piece: str) -> None:
        self.text += piece
        if self._on_text is not None:
            self._on_text(piece)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
