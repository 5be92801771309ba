"""What the pipeline asks of a task: its data, its previews, how saved steps are compared, and the files it leaves.

The loop, the checkpoints, the validation, the planner and the report are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.base_loras import LoRABeneath
    from lora_scripts.choosing.chooser import Comparison
    from lora_scripts.config import RunConfig, Size
    from lora_scripts.data.sampler import StepPlan
    from lora_scripts.data.split import Split
    from lora_scripts.data.training_data import Listing, TrainingData
    from lora_scripts.families.protocol import ModelFamily
    from lora_scripts.models.source import BaseModel
    from lora_scripts.preflight.findings import Report
    from lora_scripts.training.events import Events
    from lora_scripts.training.resume import Resumable

__all__ = ["DataOutline", "Finishing", "Prepared", "Previewing", "Progress", "Run", "Task"]

Progress = Callable[[str, int, int], None]
"""Told (what, done, total); may raise to stop."""


@dataclass(frozen=True)
class Prepared:
    """Data that was checked and is ready to train.

    Attributes:
        listing: all examples by name, those held out too.
        parts: what trains and what is held out.
        check: what was found before the run.
    """

    listing: Listing
    parts: Split
    check: Report


@dataclass(frozen=True)
class DataOutline:
    """What a run will train on, as far as it is known without the model's weights.

    Attributes:
        train: what trains; its batches may be fake tensors.
        facts: (what, value) pairs for people.
        unit: what the examples' `cost` counts, in the plural.
        is_measured: whether examples are held out to measure the validation loss on.
        smaller: the same with smaller examples, mildest first: (setting, what trains then).
        previews, resolution: pictures rendered each time, and their size.
    """

    train: TrainingData
    facts: Sequence[tuple[str, str]]
    unit: str
    is_measured: bool
    smaller: Callable[[], Iterator[tuple[str, TrainingData]]]
    previews: int = 0
    resolution: Size = (0, 0)


@dataclass(frozen=True)
class Run:
    """The parts of one run that is about to begin; what is optional in it for the pipeline is so for nobody else.

    Attributes:
        beneath: LoRAs that are folded into the family's weights.
    """

    config: RunConfig
    source: BaseModel
    family: Any
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    prepared: Prepared
    plan: StepPlan
    max_steps: int
    started_at: float
    device: torch.device
    events: Events
    beneath: Sequence[LoRABeneath] = ()


class Previewing(Protocol):
    """Shows what the model does as it is, for the same prompts at every step.

    Attributes:
        requests: empty when nothing is to be shown.
    """

    requests: Sequence[Any]

    def render(self, step: int) -> None:
        """Shows it to the listeners."""
        ...

    def repeat(self, step: int) -> None:
        """The same for a saved step whose weights were put back; the listeners know it already."""
        ...


class Finishing(Protocol):
    """Writes what a run leaves.

    Attributes:
        proofs: lines that say what was compared, after `export`.
    """

    proofs: list[str]

    def write_step(self, folder: Path, step: int) -> None:
        """Writes the loadable LoRA of a saved step into its checkpoint's folder."""
        ...

    def export(self, step: int) -> list[Path]:
        """The finished files of the model as it is, read back and compared; the LoRA first.

        The trained layers are taken out of the model on the way, so this is the last thing done with it.

        Raises:
            ExportError: something cannot be written or read back, or does not do what was trained.
        """
        ...


class Task(Protocol):
    """One kind of training: `tasks/text_to_image.py` is the example to read. Its methods are called in this order."""

    @staticmethod
    def require_inputs(config: RunConfig) -> None:
        """Looks at what the settings name, as far as that costs little.

        Raises:
            LoraScriptsError: something is not there, or not what it should be.
        """
        ...

    def __init__(self, config: RunConfig) -> None: ...

    def prepare(
        self, family: ModelFamily, device: torch.device, events: Events, progress: Progress, force: bool
    ) -> Prepared:
        """Data, checked and encoded, in the parts that train and that are held out.

        Raises:
            DataError: there is nothing to train on, or the check found something red and `force` is not set.
        """
        ...

    def outline(self, family: ModelFamily, device: torch.device, progress: Progress) -> DataOutline:
        """The data as a plan needs it; the family may be one without weights.

        Raises:
            DataError: there is nothing to train on.
        """
        ...

    def facts(self) -> Sequence[tuple[str, str]]:
        """(what, value) pairs about the data for the head of the log."""
        ...

    def settings(self) -> dict[str, Any]:
        """Settings as they are in force where the config leaves them to the model."""
        ...

    def previews(self, run: Run) -> Previewing:
        """What is shown during the run."""
        ...

    def finishing(self, run: Run, previews: Previewing) -> Finishing:
        """What writes the files."""
        ...

    def comparison(self, run: Run, run_state: Resumable, previews: Previewing) -> Comparison | None:
        """How saved steps are compared beside their held-out loss; None where by nothing else."""
        ...
