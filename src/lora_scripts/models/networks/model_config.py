"""A network's configuration: a dictionary whose entries are attributes too, as diffusers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ModelConfig", "fits"]


class ModelConfig(dict[str, Any]):
    """Settings by name; `config.in_channels` is `config["in_channels"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no such setting: {name}") from None


def fits(config: Mapping[str, Any], free: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    """Whether a network that is built like the published ones has all that a configuration asks for.

    Args:
        free: settings that it follows, with their defaults.
        fixed: settings of which it has but this one.
    """
    return all(
        key.startswith("_") or key in free or (key in fixed and value == fixed[key]) for key, value in config.items()
    )
