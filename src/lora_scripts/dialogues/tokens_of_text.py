"""Texts become tokens, and stretches of characters become marks on tokens.

Legend for shapes: L tokens of one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from lora_scripts.dialogues.spans import Rendered

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["marked_tokens"]


def marked_tokens(tokenizer: Any, texts: Sequence[Rendered]) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Of every text its token ids [L] and which of them are learnt [L]; the first one never is, for nothing predicts it.

    The text is tokenised as a whole, once: a word may become other tokens when it is cut out. Special tokens that the text
    should have stand in it already, so that none is added.
    """
    import numpy as np

    if not texts:
        return []
    encoded = tokenizer(
        [each.text for each in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    marked = []
    for each, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        tokens = np.asarray(ids, dtype=np.int32)
        places = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(tokens)).reshape(-1, 2)
        marked.append((tokens, _marks(each, places)))
    return marked


def _marks(rendered: Rendered, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens begin in a span.

    Tokenizers disagree on whether the blank before a word is part of its token's place in the text, and some token may
    begin with a blank of the question's and go on with the answer's first word. Either way it is the answer's first token:
    a blank in front does not count.
    """
    import numpy as np

    begins, ends = offsets[:, 0], offsets[:, 1]
    trained = np.zeros(len(offsets), dtype=np.bool_)
    for begin, end in rendered.spans:
        blank_from = len(rendered.text[:begin].rstrip())
        trained |= (begins >= begin) & (begins < end)
        trained |= (begins >= blank_from) & (begins < begin) & (ends > begin)
    trained[:1] = False
    return trained
