"""One language model that speaks as itself and through any number of LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    from lora_scripts.answering.generate import Answerer
    from lora_scripts.dialogues.answers import Answer, AnswerRequest

__all__ = ["BASE", "NamedLora", "Voices", "named_loras", "open_voices"]

BASE = "base"
MOST_CPU_FLOAT32 = 2_000_000_000
"""Parameters; up to here a CPU computes in float32, which is quicker there than the halves that most files hold."""


@dataclass(frozen=True)
class NamedLora:
    """A PEFT folder and what it is called here."""

    name: str
    folder: Path


def named_loras(texts: Sequence[str]) -> list[NamedLora]:
    """`FOLDER` or `FOLDER=NAME`; without a name the folder's own.

    Raises:
        ConfigError: two have one name, or one is called like the base model.
    """
    loras: list[NamedLora] = []
    for text in texts:
        folder, equals, name = text.rpartition("=")
        if not equals or Path(text).exists():
            folder, name = text, Path(text).resolve().name
        if name == BASE or not name or any(name == lora.name for lora in loras):
            raise ConfigError(f"--lora {text}: the name {name!r} is taken or empty. Write {folder}=ANOTHER_NAME.")
        loras.append(NamedLora(name, Path(folder)))
    return loras


def open_voices(base_model: str, loras: Sequence[NamedLora], device: str, *, allow_download: bool = False) -> Voices:
    """The model with its LoRAs read and checked.

    Raises:
        ConfigError: no such device.
        ModelError: the base model or a LoRA cannot be used, or they do not belong together.
    """
    from lora_scripts.devices import choose_device
    from lora_scripts.export.language_base import open_base
    from lora_scripts.export.reader import read_lora_file

    chosen = choose_device(device)
    base = open_base(base_model, allow_download=allow_download)
    shapes = base.layer_shapes()
    read = {lora: read_lora_file(lora.folder, shapes).weights for lora in loras}  # before the model, which takes longer
    model = base.load()
    if chosen.type == "cpu" and model.num_parameters() <= MOST_CPU_FLOAT32:
        model.float()
    return Voices(base, model.to(chosen), read)


class Voices:
    """The base model, and it with each LoRA.

    Attributes:
        title: of the base model, for people.
        names: of the LoRAs, in the order given.
    """

    def __init__(self, base: Any, model: Any, loras: dict[NamedLora, Any]) -> None:
        from lora_scripts.export.names import LANGUAGE_MODEL
        from lora_scripts.sampling.lora_set import LoRASet

        self.title: str = base.title
        self.names = [lora.name for lora in loras]
        self._base, self._model = base, model
        self._loras = {lora.name: (lora, weights) for lora, weights in loras.items()}
        self._at_work = LoRASet({LANGUAGE_MODEL: model})
        self._answerers: dict[str, Answerer] = {}

    def answer(
        self, who: str, request: AnswerRequest, weight: float = 1.0, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """One answer of the base model (`BASE`) or of a LoRA; as `Answerer.answer`.

        Args:
            weight: how strongly the LoRA works.
        """
        from lora_scripts.sampling.lora_set import WeightedLoRA

        self._at_work.apply([] if who == BASE else [WeightedLoRA(self._loras[who][1], weight)])
        return self._answerer(who).answer(request, on_text)

    def require_room(self, who: str, request: AnswerRequest) -> None:
        """As `Answerer.require_room`, with the template of whoever is asked."""
        self._answerer(who).require_room(request)

    def _answerer(self, who: str) -> Answerer:
        """A LoRA asks with the chat template that it was trained with, where its folder brings one."""
        from lora_scripts.answering.generate import Answerer
        from lora_scripts.merging.language_model import tokenizer_folder
        from lora_scripts.models.language_model import load_tokenizer

        if who not in self._answerers:
            folder = tokenizer_folder(self._base, [] if who == BASE else [self._loras[who][0].folder])
            self._answerers[who] = Answerer(self._model, load_tokenizer(folder, self.title))
        return self._answerers[who]
