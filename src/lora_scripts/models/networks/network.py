"""What all networks have in common: they are built from the configuration of the library's class of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

__all__ = ["ModelConfig", "Network"]


class ModelConfig(dict[str, Any]):
    """Settings by name; `config.in_channels` is `config["in_channels"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no such setting: {name}") from None


class Network(nn.Module):
    """A network and its configuration.

    Attributes:
        free: settings that it follows, with their defaults.
        fixed: settings of which it has but this value.
    """

    free: ClassVar[Mapping[str, Any]]
    fixed: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config`: as the library's class takes it, as far as `can_be` is true of it."""
        super().__init__()
        self.config = ModelConfig({**self.free, **self.fixed, **config})

    @classmethod
    def can_be(cls, config: Mapping[str, Any]) -> bool:
        """Whether a configuration asks for nothing that this class lacks."""
        return all(
            key.startswith("_") or key in cls.free or (key in cls.fixed and value == cls.fixed[key])
            for key, value in config.items()
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
