"""What the report is told beyond the run's record."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.report.usage import Usage, use_in_prompts
from lora_scripts.words import PICTURES, Words

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.choosing.rule import StepScore
    from lora_scripts.preflight.findings import Report

__all__ = ["FolderRow", "HardThumbnail", "Measurement", "ReportFacts", "Thumbnail"]


@dataclass(frozen=True)
class Thumbnail:
    """One picture of the data set with its name and the caption it was trained with."""

    image: Image
    name: str
    caption: str


@dataclass(frozen=True)
class FolderRow:
    """One folder of the data set.

    Attributes:
        uses: of its pictures in an epoch, on average.
        weight: how much each counts in the loss.
        regularization: whether they are for that.
    """

    name: str
    pictures: int
    uses: float
    trigger: str = ""
    weight: float = 1.0
    regularization: bool = False


@dataclass(frozen=True)
class HardThumbnail:
    """A picture that is fitted badly, how badly, and what to look at."""

    picture: Thumbnail
    loss: str
    hint: str


@dataclass(frozen=True)
class Measurement:
    """One figure without and with the LoRA; where both are percentages (`"93 %"`) they are also drawn as bars."""

    label: str
    before: str
    after: str
    note: str = ""


@dataclass(frozen=True)
class ReportFacts:
    """Everything is optional; a section whose facts are missing is left out.

    Attributes:
        name: of the LoRA; also what stands in `<lora:NAME:0.8>`.
        words: how the report calls what was trained on.
        trigger: the word to write in prompts.
        weight: the weight proposed for prompts.
        use: how to use the finished files. Default: in prompts for pictures, with name, trigger and weight.
        num_examples: pictures or dialogues that trained. Default: as many as there are captions.
        folders: where the pictures come from; empty for one folder.
        left_out: (name, reason) of what did not train.
        bucket_counts: "512x768" -> pictures.
        check: what was found before the run.
        chosen_step: the step whose weights the finished file holds. Default: the last one.
        chosen_why: a sentence or two on why, and how sure that is.
        step_scores: the saved steps that were compared for it.
        worst_fitted: pictures with the highest losses, the worst first.
        worst_fitted_texts: the same of dialogues: name, what it says, how badly and what to look at.
        files: the finished files. Default: those that the record names.
        verification: what was proven about the finished file, one line each.
        advice: what to change in the next run, one line each.
        next_commands: (what it does, command).
        written_settings: the settings the user wrote. Default: those that differ from their default.
        device: "NVIDIA GeForce RTX 4090", "CPU, 2 threads". Default: the run's fact of that name.
        environment: (what, version). Default: Python, the system and the libraries of the field.
    """

    name: str = "LoRA"
    words: Words = PICTURES
    trigger: str = ""
    weight: float = 0.8
    use: Usage | None = None
    num_examples: int | None = None
    thumbnails: Sequence[Thumbnail] = ()
    folders: Sequence[FolderRow] = ()
    left_out: Sequence[tuple[str, str]] = ()
    bucket_counts: Mapping[str, int] = field(default_factory=dict)
    measurements: Sequence[Measurement] = ()
    check: Report | None = None
    chosen_step: int | None = None
    chosen_why: str = ""
    step_scores: Sequence[StepScore] = ()
    worst_fitted: Sequence[HardThumbnail] = ()
    worst_fitted_texts: Sequence[tuple[str, str, str]] = ()
    files: Sequence[Path] = ()
    verification: Sequence[str] = ()
    advice: Sequence[str] = ()
    next_commands: Sequence[tuple[str, str]] = ()
    written_settings: Collection[str] | None = None
    device: str = ""
    environment: Sequence[tuple[str, str]] = ()

    @property
    def usage(self) -> Usage:
        return self.use or use_in_prompts(self.name, self.trigger, self.weight)
