"""Examples as tokens, each with marks on what is learnt.

Legend for shapes: L tokens of one example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_scripts.data.dataset import LeftOut

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TokenisedExample", "TokenisedSet"]

SHOWN = 20


@dataclass(frozen=True, slots=True, eq=False)
class TokenisedExample:
    """What goes through the model as one sequence.

    Attributes:
        name: the row's, with ` answer 2` or ` part 2` behind it where a row has several examples; unique.
        digest: of its content; copies have the same.
        tokens: [L], token ids.
        trained: [L], whether a token is learnt: predicted from all before it. The first one never is.
    """

    name: str
    digest: str
    repeats: int
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]

    @property
    def cost(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def num_trained(self) -> int:
        return int(self.trained.sum())

    def cut_to(self, length: int) -> TokenisedExample:
        """Its first tokens."""
        return replace(self, tokens=self.tokens[:length], trained=self.trained[:length])


@dataclass(frozen=True)
class TokenisedSet:
    """All examples, those that were left out, and what was cut.

    Attributes:
        cut: name -> its length in tokens before it was cut to `max_length`.
        max_length: tokens of the longest example there can be.
    """

    examples: Sequence[TokenisedExample]
    left_out: Sequence[LeftOut] = ()
    cut: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    max_length: int = 0

    @property
    def digest(self) -> str:
        """Changes when any token or mark changes."""
        whole = hashlib.sha256()
        for example in self.examples:
            whole.update(f"{example.name}\n{example.repeats}\n".encode())
            whole.update(example.tokens.tobytes())
            whole.update(example.trained.tobytes())
        return whole.hexdigest()

    @property
    def num_tokens(self) -> int:
        return sum(example.cost for example in self.examples)

    @property
    def num_trained(self) -> int:
        return sum(example.num_trained for example in self.examples)

    def summary(self) -> list[str]:
        """Lines for people: tokens, what is learnt of them, what was cut and left out, at most twenty names of each."""
        tokens, trained = self.num_tokens, self.num_trained
        share = f" ({trained / tokens:.0%})" if tokens else ""
        lines = [f"{len(self.examples):,} examples of {tokens:,} tokens; {trained:,} of them are learnt{share}."]
        if self.cut:
            lines.append(f"{len(self.cut):,} are longer than max_length {self.max_length} and lose their end:")
            lines += [f"  cut: {name}: {length:,} tokens" for name, length in list(self.cut.items())[:SHOWN]]
            lines += [f"  cut: {len(self.cut) - SHOWN:,} more"] if len(self.cut) > SHOWN else []
        lines += [f"  left out: {item.name}: {item.reason}" for item in self.left_out[:SHOWN]]
        lines += [f"  left out: {len(self.left_out) - SHOWN:,} more"] if len(self.left_out) > SHOWN else []
        return lines
