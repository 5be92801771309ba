"""The WebUI's prompt syntax: `<lora:NAME:0.7>`, `(word:1.2)`, `[word]`, `\\(`.

Pure functions from text to text and numbers; what they mean for embeddings is in `embed.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lora_scripts.errors import ConfigError

__all__ = ["LoRATag", "Prompt", "has_emphasis", "parse_emphasis", "parse_prompt"]

_TAG = re.compile(r"<(lora|lyco):([^<>]+)>", re.IGNORECASE)
_EMPHASIS = re.compile(
    r"""
    \\[\\()\[\]]                              # an escaped bracket or backslash stands for itself
    | \\                                      # any other backslash as well
    | [(\[]                                   # opens a range
    | :\s*(?P<weight>[+-]?[.\d]+)\s*\)        # closes a round one with its weight
    | [)\]]                                   # closes one
    | [^\\()\[\]:]+
    | :
    """,
    re.VERBOSE,
)
_ROUND, _SQUARE = 1.1, 1 / 1.1


@dataclass(frozen=True)
class LoRATag:
    """One `<lora:NAME:...>`.

    Attributes:
        text_encoder_weight, unet_weight: strengths; one number in the tag sets both.
    """

    name: str
    text_encoder_weight: float = 1.0
    unet_weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was written, apart: the words for the text encoder and the LoRAs to apply."""

    text: str
    loras: tuple[LoRATag, ...]


def parse_prompt(prompt: str) -> Prompt:
    """Takes the LoRA tags out of a prompt.

    `<lora:NAME>` is weight 1, `<lora:NAME:0.7>` sets both parts, `<lora:NAME:0.7:0.5>` the text encoder and then the
    UNet; `te=` and `unet=` name them. A name that occurs twice is applied twice, as the weights say.

    Raises:
        ConfigError: a tag has no name, or a weight that is not a number.
    Source: AUTOMATIC1111/stable-diffusion-webui, `extensions-builtin/Lora/extra_networks_lora.py`.
    """
    tags = tuple(_tag(match) for match in _TAG.finditer(prompt))
    return Prompt(_TAG.sub("", prompt).strip(), tags)


def _tag(match: re.Match[str]) -> LoRATag:
    name, *parts = (part.strip() for part in match[2].split(":"))
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    plain = [part for part in parts if "=" not in part]
    if not name:
        raise ConfigError(f"{match[0]}: the name is missing. Write <lora:NAME:0.7>.")

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"{match[0]}: {text!r} is not a weight. Write a number, as in <lora:{name}:0.7>.")
        return value

    text_encoder = number(named.get("te", plain[0] if plain else "1"))
    unet = number(named.get("unet", plain[1] if len(plain) > 1 else str(text_encoder)))
    return LoRATag(name, text_encoder, unet)


def parse_emphasis(text: str) -> list[tuple[str, float]]:
    """Pieces of a prompt with their weights; neighbours of equal weight are joined.

    `(x)` multiplies by 1.1, `((x))` by 1.21, `(x:1.3)` by 1.3, `[x]` divides by 1.1, `\\(` is a bracket. A range that is
    never closed runs to the end; a closing bracket without an opening one is text.

    >>> parse_emphasis("an (important:1.3) word")
    [('an ', 1.0), ('important', 1.3), (' word', 1.0)]

    Source: AUTOMATIC1111/stable-diffusion-webui, `modules/prompt_parser.py`, whose results we match.
    """
    pieces: list[list[str | float]] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def multiply(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] = float(piece[1]) * factor

    for match in _EMPHASIS.finditer(text):
        mark, weight = match[0], match["weight"]
        if mark.startswith("\\"):
            pieces.append([mark[1:], 1.0])
        elif mark == "(":
            open_round.append(len(pieces))
        elif mark == "[":
            open_square.append(len(pieces))
        elif weight is not None and open_round and _is_number(weight):
            multiply(open_round.pop(), float(weight))
        elif mark == ")" and open_round:
            multiply(open_round.pop(), _ROUND)
        elif mark == "]" and open_square:
            multiply(open_square.pop(), _SQUARE)
        else:
            pieces.append([mark, 1.0])
    for start in open_round:
        multiply(start, _ROUND)
    for start in open_square:
        multiply(start, _SQUARE)

    joined: list[tuple[str, float]] = []
    for piece, factor in pieces:
        if joined and joined[-1][1] == factor:
            joined[-1] = (joined[-1][0] + str(piece), float(factor))
        else:
            joined.append((str(piece), float(factor)))
    return joined or [("", 1.0)]


def has_emphasis(text: str) -> bool:
    """Whether any part of a prompt has another weight than 1."""
    return any(weight != 1.0 for _, weight in parse_emphasis(text))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
