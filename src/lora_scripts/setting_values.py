"""Values of settings in the ways in which people write them: one name for a list of one, 512 for 512x512, `~` for the home folder.

What cannot be read is handed on as it is, for pydantic to refuse with the setting's name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

__all__ = ["Fraction", "Names", "Positive", "Size", "UserPath", "entries_of", "parse_size"]

Size = tuple[int, int]
"""Width and height in pixels."""


def parse_size(value: Any) -> Any:
    """(width, height) from 512, "768x768", "768×512", [768, 512]."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, str):
        numbers = re.fullmatch(r"\s*(\d+)\s*(?:[x×,*]\s*(\d+)\s*)?", value)
        if numbers is None:
            raise ValueError('write 512, "768x768" or [768, 768]')
        width = int(numbers[1])
        return (width, int(numbers[2] or width))
    return value


def entries_of(value: Any) -> Any:
    """Entries `{path: ...}` from one path or a list of paths."""
    entries = [value] if isinstance(value, str | Path | dict) else value
    if not isinstance(entries, list):
        return value
    return [{"path": entry} if isinstance(entry, str | Path) else entry for entry in entries]


def _split_names(value: Any) -> Any:
    """A list from one name or a comma-separated text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _expand_path(value: Any) -> Any:
    """A path with `~` resolved from text."""
    if not (isinstance(value, str) and value.strip()):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError("names a user whose home folder is not known here; write the whole path") from None


UserPath = Annotated[Path, BeforeValidator(_expand_path)]
Names = Annotated[list[str], BeforeValidator(_split_names)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
