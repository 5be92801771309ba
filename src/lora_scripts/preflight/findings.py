"""What a check has found, and all findings of a data set as one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lora_scripts.errors import DataError
from lora_scripts.words import PICTURES, Words

if TYPE_CHECKING:
    from lora_scripts.planning.fit_memory import FittedRun

__all__ = ["Finding", "Level", "Prediction", "Report"]

Level = Literal["red", "amber", "note"]
"""red blocks a run, amber explains what will go less well, a note only informs."""

_ORDER: Mapping[Level, int] = {"red": 0, "amber": 1, "note": 2}
JSON_FORMAT = 1
SHOWN_DETAILS = 20
"""Pictures that an error message names one by one."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        code: stable name for programs, such as "near-duplicates"; see docs/checks.md.
        text: what was found, one complete sentence.
        names: the pictures concerned, all of them.
        remedy: what to do; empty for a note that asks for nothing.
        details: by name, what concerns this picture alone: why it cannot be read, which text is cut, whose copy it is.
    """

    level: Level
    code: str
    text: str
    names: Sequence[str] = ()
    remedy: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """What the run will take.

    Attributes:
        steps: optimizer steps still to do.
        disk_bytes: checkpoints, previews and encodings still to write.
        free_bytes: free where they go.
        step_seconds, total_seconds, peak_bytes: None where no step was measured.
        device_bytes: memory of the training device; None where it is not known.
    """

    steps: int
    disk_bytes: int
    free_bytes: int
    step_seconds: float | None = None
    total_seconds: float | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """All findings of a data set.

    Attributes:
        num_trained, num_examples: how many pictures or dialogues train, of how many that there are.
        fitted: the config with what its settings on auto come to, where a step was measured.
        words: how messages call what was checked.
        shown: lines about the data to be shown below the findings.
    """

    findings: Sequence[Finding]
    num_trained: int
    num_examples: int
    prediction: Prediction | None = None
    fitted: FittedRun | None = None
    words: Words = PICTURES
    shown: Sequence[str] = ()

    @property
    def worst_first(self) -> list[Finding]:
        """Red before amber before notes; within a level, what concerns most pictures first."""
        return sorted(self.findings, key=lambda finding: (_ORDER[finding.level], -len(finding.names)))

    @property
    def blocked(self) -> bool:
        return any(finding.level == "red" for finding in self.findings)

    def count(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)

    def exit_code(self, force: bool = False) -> int:
        """2 when something red was found and `force` does not override it, else 0."""
        return 2 if self.blocked and not force else 0

    def require_good(self, force: bool = False) -> None:
        """Raises DataError with everything red and what is known of single pictures, unless `force` is set."""
        if self.exit_code(force) == 0:
            return
        lines = []
        for finding in self.worst_first:
            if finding.level == "red":
                lines.append(f"{finding.text} {finding.remedy}".strip())
                lines += [f"  {name}: {detail}" for name, detail in list(finding.details.items())[:SHOWN_DETAILS]]
        raise DataError("\n".join([*lines, "The run was not started. --force starts it all the same."]))

    def to_json(self) -> dict[str, Any]:
        """The report as docs/checks.md describes it: plain JSON values, findings worst first."""
        return {
            "format": JSON_FORMAT,
            "verdict": "blocked" if self.blocked else "attention" if self.count("amber") else "good",
            self.words.examples: {"total": self.num_examples, "trained": self.num_trained},
            "counts": {level: self.count(level) for level in _ORDER},
            "findings": [
                {
                    "level": finding.level,
                    "code": finding.code,
                    "text": finding.text,
                    "names": list(finding.names),
                    "details": dict(finding.details),
                    "remedy": finding.remedy,
                }
                for finding in self.worst_first
            ],
            **({"shown": list(self.shown)} if self.shown else {}),
            "prediction": None if self.prediction is None else dict(vars(self.prediction)),
        }
