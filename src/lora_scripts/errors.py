"""Every error a user can cause, in one tree.

    LoraScriptsError            what happened, where, what to do; printed without a traceback, exit code 2
    |-- ConfigError             a setting is unknown, out of range, contradictory, or can have no effect
    |-- DataError               a picture, caption or table cannot be used
    |-- ModelError              a base model or captioner cannot be used
    |-- TargetError             a layer name matches nothing in the model
    |-- ResumeError             the output folder holds another run than the one asked for
    |-- ExportError             the finished file could not be written, read back, or has no effect
    `-- TrainingError           the run itself cannot go on (numbers no longer finite, no room left on the disk)

Anything else that escapes is our own fault: it keeps its traceback and ends with exit code 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = [
    "ConfigError",
    "DataError",
    "ExportError",
    "LoraScriptsError",
    "ModelError",
    "ResumeError",
    "TargetError",
    "TrainingError",
    "did_you_mean",
]


class LoraScriptsError(Exception):
    """Base of all errors that a user can cause and mend; the text is one or more complete lines."""

    exit_code = 2


class ConfigError(LoraScriptsError):
    """One or more settings are wrong; `faults` holds one line each, reported together."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class DataError(LoraScriptsError):
    """A picture, caption or table cannot be used."""


class ModelError(LoraScriptsError):
    """A base model, captioner or LoRA file cannot be used."""


class TargetError(LoraScriptsError):
    """A layer name matches nothing in the model."""


class ResumeError(LoraScriptsError):
    """The output folder holds another run than the one asked for."""


class ExportError(LoraScriptsError):
    """The finished file could not be written or read back, or would change nothing."""


class TrainingError(LoraScriptsError):
    """The run itself cannot go on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the nearest known word, or an empty string when nothing is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
