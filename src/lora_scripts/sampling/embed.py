"""Prompts to text embeddings the way the WebUI makes them: emphasis as factors, long prompts in pieces.

A prompt without emphasis that fits gives exactly what the text encoder gives.

Legend for shapes: L tokens of one piece (77 for CLIP), D width of the text encoder, P pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_scripts.models.text_encoding import ReadText, TextStates, read_normed
from lora_scripts.sampling.prompt import parse_emphasis

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PromptStates", "embed_prompts", "read_prompts"]

_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_COMMA_BACKTRACK = 20
"""A piece that is full ends at its last comma if that is at most so many tokens back."""

_ENCODE_AT_ONCE = 32
_LEAST_MEAN = 0.01


@dataclass(frozen=True)
class _Piece:
    """The tokens of one pass through the text encoder, start and end marks left out, with their factors."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class PromptStates:
    """A prompt as a text encoder reads it.

    Attributes:
        embeds: [P * L, D].
        pooled: what the text encoder makes of the first piece as a whole, untouched by emphasis; None where it makes nothing.
    """

    embeds: Tensor
    pooled: Tensor | None


def embed_prompts(text_encoder: Any, tokenizer: Any, prompts: Sequence[str], *, clip_skip: int = 1) -> list[Tensor]:
    """One tensor [P * L, D] per prompt, as Stable Diffusion 1 and 2 read them; see `read_prompts`."""
    return [each.embeds for each in read_prompts(text_encoder, tokenizer, prompts, read_normed, clip_skip)]


def read_prompts(
    text_encoder: Any, tokenizer: Any, prompts: Sequence[str], read: ReadText, clip_skip: int = 1
) -> list[PromptStates]:
    """What a text encoder makes of each prompt, in its dtype and on its device.

    Args:
        prompts: with emphasis, `BREAK` and any length; LoRA tags taken out.
        read: which layer is read, and how.
        clip_skip: as `read` counts it.
    Source: AUTOMATIC1111/stable-diffusion-webui, `modules/sd_hijack_clip.py` and `modules/sd_emphasis.py` ("Original").
    """
    import torch

    pieces = {prompt: _pieces(tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
    unique = list(dict.fromkeys(piece for parts in pieces.values() for piece in parts))
    encoded: dict[_Piece, PromptStates] = {}
    for start in range(0, len(unique), _ENCODE_AT_ONCE):
        chunk = unique[start : start + _ENCODE_AT_ONCE]
        states = read(text_encoder, _input_ids(text_encoder, tokenizer, chunk), clip_skip)
        encoded |= zip(chunk, _split(states, chunk), strict=True)
    return [
        PromptStates(torch.cat([encoded[piece].embeds for piece in pieces[prompt]]), encoded[pieces[prompt][0]].pooled)
        for prompt in prompts
    ]


def _input_ids(text_encoder: Any, tokenizer: Any, pieces: Sequence[_Piece]) -> Tensor:
    """[pieces, L] with the tokenizer's own marks and filling."""
    import torch

    length = int(tokenizer.model_max_length)
    rows = []
    for piece in pieces:
        row = [tokenizer.bos_token_id, *piece.ids, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
    return torch.tensor(rows, device=next(text_encoder.parameters()).device)


def _split(states: TextStates, pieces: Sequence[_Piece]) -> list[PromptStates]:
    """The pieces' own states, their emphasis at work."""
    return [
        PromptStates(
            _weighted(states.embeds[number], piece.weights), None if states.pooled is None else states.pooled[number]
        )
        for number, piece in enumerate(pieces)
    ]


def _weighted(embeds: Tensor, weights: Sequence[float]) -> Tensor:
    """[L, D] times each token's factor, scaled back to the mean it had: emphasis moves a prompt, not its size."""
    import torch

    if all(weight == 1.0 for weight in weights):
        return embeds
    factors = torch.ones(len(embeds), device=embeds.device, dtype=torch.float32)
    factors[1 : 1 + len(weights)] = torch.tensor(weights, device=embeds.device)
    scaled = embeds.float() * factors[:, None]
    before, after = embeds.float().mean(), scaled.mean()
    # Where there is no mean to speak of, the quotient would be one of rounding errors.
    if after.abs() > _LEAST_MEAN * scaled.std():
        scaled = scaled * (before / after)
    return scaled.to(embeds.dtype)


def _pieces(tokenizer: Any, prompt: str) -> list[_Piece]:
    """A prompt's tokens, cut where the WebUI cuts: at BREAK, when full, if possible behind a comma."""
    room = int(tokenizer.model_max_length) - 2
    comma = tokenizer(",", add_special_tokens=False)["input_ids"][-1]
    pieces: list[_Piece] = []
    for section in _BREAK.split(prompt):
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parse_emphasis(section):
            found = _token_ids(tokenizer, text)
            ids += found
            weights += [weight] * len(found)
        while len(ids) > room:
            end = room
            window = ids[max(0, room - _COMMA_BACKTRACK) : room]
            if ids[room] != comma and comma in window:
                end = room - window[::-1].index(comma)
            pieces.append(_Piece(tuple(ids[:end]), tuple(weights[:end])))
            ids, weights = ids[end:], weights[end:]
        pieces.append(_Piece(tuple(ids), tuple(weights)))
    return pieces


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    # Asked for without a limit, the tokenizer would warn about every long prompt, which are cut into pieces here.
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
