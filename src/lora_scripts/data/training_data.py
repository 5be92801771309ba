"""What the loop, the validation, the planner and the checkpoints ask of a data set, whatever its examples are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch

    from lora_scripts.data.dataset import LeftOut
    from lora_scripts.data.sampler import Sample
    from lora_scripts.families.protocol import Batch

__all__ = ["Listing", "TrainingData", "TrainingExample"]


class TrainingExample(Protocol):
    """One thing that is trained on: a picture with its caption, a dialogue.

    Attributes:
        name: unique in the data set, for people.
        caption: what it says, for people.
        digest: of its content, hexadecimal; copies have the same.
        repeats: uses per epoch.
        shape: examples of one shape can be stacked, and go through the model together.
        is_regularization: it is there to keep what the model knows, not to be learnt; such examples have as many uses in an
            epoch as all others together.
        cost: how much of a pass it takes, in any unit that is the same for all: pixels, tokens.
    """

    @property
    def name(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def repeats(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def cost(self) -> int: ...
    @property
    def is_regularization(self) -> bool: ...


class Listing(Protocol):
    """The examples by name, with what was left out and noticed on the way.

    Attributes:
        left_out: what does not train, and why.
        notes: lines for people.
    """

    @property
    def examples(self) -> Sequence[Any]: ...
    @property
    def left_out(self) -> Sequence[LeftOut]: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def summary(self) -> list[str]:
        """How many examples train, and the names of those that do not, one line each."""
        ...

    def identity(self) -> Mapping[str, str]:
        """What a checkpoint keeps to notice that the data set was changed: name -> all that decides about training."""
        ...


class TrainingData(Protocol):
    """Examples in memory, ready to be put into batches."""

    @property
    def dataset(self) -> Any:
        """The `Listing` that the examples come from."""
        ...

    @property
    def examples(self) -> Sequence[TrainingExample]: ...

    @property
    def home(self) -> torch.device | None:
        """The device where its tensors lie; None for the computer's own memory."""
        ...

    def at_home_on(self, device: torch.device, most_bytes: int) -> Self:
        """The same with its tensors on the device, where they take no more than so much of its memory."""
        ...

    def batch(self, samples: Sequence[Sample], device: torch.device) -> Batch:
        """The examples of one micro-batch on the device; all of one shape."""
        ...

    def part(self, indices: Sequence[int]) -> Self:
        """Some of the examples, in the order given."""
        ...

    def as_written(self) -> Self:
        """The same without anything random (mirroring, dropout), for measurements."""
        ...
