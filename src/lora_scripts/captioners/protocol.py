"""What a captioner offers to the labelling engine. A captioner is one file and one line in the table of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["Candidates", "Captioner", "CaptionerSettings", "Decoding"]

Decoding = Literal["greedy", "beam", "nucleus"]


@dataclass(frozen=True)
class CaptionerSettings:
    """How captions are worded and drawn.

    Attributes:
        num_candidates: captions written per picture; the best one is kept. None: as many as the captioner needs.
        decoding: how candidates arise. "greedy": the first takes the likeliest token each time, further ones are sampled;
            "beam": the best of a beam search; "nucleus": all are sampled.
        top_p: nucleus sampling draws from the likeliest words that together have this probability.
        prompt: words that every caption continues.
        min_tokens, max_tokens: length of a caption in tokens (a word has one or two).
        seed: another seed, other samples; greedy and beam captions do not depend on it.
        rank_model: for captioners that choose with a second model: its folder, hub id or built-in name.
        download: fetch a hub model that is not on this machine; otherwise nothing touches the network.
    """

    num_candidates: int | None = None
    decoding: Decoding = "greedy"
    num_beams: int = 3
    top_p: float = 0.9
    prompt: str = ""
    min_tokens: int = 5
    max_tokens: int = 40
    seed: int = 42
    rank_model: str | None = None
    download: bool = False


@dataclass(frozen=True)
class Candidates:
    """The captions written for one picture, best first, no two alike.

    Attributes:
        scores: what they are ordered by, higher is better; the unit is the captioner's own.
        likelihoods: geometric mean of the tokens' probabilities in the caption model, 0..1.
        truncated: whether the longest allowed caption was reached before its end.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    likelihoods: tuple[float, ...]
    truncated: tuple[bool, ...]


class Captioner(Protocol):
    """A model that writes captions for pictures."""

    name: ClassVar[str]
    """As written after --captioner."""
    licence: ClassVar[str]
    """Of the weights that it is made for."""
    memory: ClassVar[str]
    """What it needs, for people."""

    @classmethod
    def load(
        cls, model: str | None, device: torch.device, dtype: torch.dtype | None, settings: CaptionerSettings
    ) -> Self:
        """The captioner with its weights on `device`.

        Args:
            model: a folder, a hub id or a built-in name; None for the best one that is on this machine.
            dtype: number format; None for the fastest one that the device computes well in.
        Raises:
            ModelError: the model is not there, is incomplete, or is something else.
        """
        ...

    @property
    def models(self) -> dict[str, str]:
        """Names of the models in use, by their part: {"model": ..., "rank_model": ...}; goes into the side file."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Lines for the user about which models were chosen and what to expect of them."""
        ...

    @property
    def image_side(self) -> int:
        """Pixels of the larger side that the model sees; pictures may be decoded at little more than that."""
        ...

    def prepare(self, image: Image) -> Any:
        """What `caption` needs of a picture. Runs in worker threads, so it must not use the device."""
        ...

    def caption(self, prepared: Sequence[Any], keys: Sequence[str]) -> list[Candidates]:
        """Candidates for each picture.

        Args:
            keys: one per picture; what is drawn at random belongs to it and to the seed, so that the same picture gets the
                same captions in any batch.
        """
        ...
