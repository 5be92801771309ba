"""What a denoiser is given besides noise and time step for a prompt, however many text encoders read it.

Legend for shapes: L tokens (77 for each piece of a long prompt), D width of all text encoders together, P width of the pooled
text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_scripts.models.text_encoding import read_normed, read_penultimate
from lora_scripts.sampling.embed import read_prompts
from lora_scripts.sampling.prompt import parse_prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.families.protocol import SampleRequest

__all__ = [
    "Conditioner",
    "Conditions",
    "OneTextEncoder",
    "Parts",
    "TwoTextEncoders",
    "conditioner_of",
    "unet_arguments",
]


class Parts(Protocol):
    """The modules of a latent diffusion model, as `load_stable_diffusion` gives them."""

    @property
    def unet(self) -> Any: ...
    @property
    def vae(self) -> Any: ...
    @property
    def text_encoder(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def text_encoder_2(self) -> Any: ...
    @property
    def tokenizer_2(self) -> Any: ...
    @property
    def scheduler_config(self) -> Mapping[str, Any]: ...
    @property
    def prediction_type(self) -> str: ...


@dataclass(frozen=True)
class Conditions:
    """One prompt, as the U-Net takes it.

    Attributes:
        embeds: [L,D].
        added: further tensors by the U-Net's name for them: "text_embeds" [P] and "time_ids" [6] of SDXL.
    """

    embeds: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)


class Conditioner(Protocol):
    """Makes conditions of prompts.

    Attributes:
        modules: what has to be on the device for it.
    """

    @property
    def modules(self) -> Sequence[Any]: ...

    def __call__(self, requests: Sequence[SampleRequest]) -> list[tuple[Conditions, Conditions]]:
        """For each request those of its prompt and of its negative prompt, both of one length."""
        ...


@dataclass(frozen=True)
class OneTextEncoder:
    """Stable Diffusion 1 and 2: the embeddings of one text encoder."""

    parts: Parts
    clip_skip: int = 1

    @property
    def modules(self) -> Sequence[Any]:
        return (self.parts.text_encoder,)

    def __call__(self, requests: Sequence[SampleRequest]) -> list[tuple[Conditions, Conditions]]:
        texts = [*_prompts(requests), *_negatives(requests), ""]
        read = read_prompts(self.parts.text_encoder, self.parts.tokenizer, texts, read_normed, self.clip_skip)
        *embeds, empty = [text.embeds for text in read]
        pairs = zip(embeds[: len(requests)], embeds[len(requests) :], strict=True)
        return [(Conditions(a), Conditions(b)) for a, b in (_filled_up(*pair, empty) for pair in pairs)]


@dataclass(frozen=True)
class TwoTextEncoders:
    """SDXL: the embeddings of two text encoders side by side, the pooled text of the second, and the picture's size.

    An empty negative prompt is all zeros rather than the encoding of no words.

    Source: diffusers, `StableDiffusionXLPipeline` (with `force_zeros_for_empty_prompt`, as the base model is published);
    AUTOMATIC1111/stable-diffusion-webui, `modules/sd_models_xl.py`, which does so too.
    """

    parts: Parts
    clip_skip: int = 1

    @property
    def modules(self) -> Sequence[Any]:
        return (self.parts.text_encoder, self.parts.text_encoder_2)

    def __call__(self, requests: Sequence[SampleRequest]) -> list[tuple[Conditions, Conditions]]:
        negatives = _negatives(requests)
        read = self._read([*_prompts(requests), *negatives, ""])
        empty = read.pop()[0]
        pairs = []
        for request, words, positive, negative in zip(
            requests, negatives, read[: len(requests)], read[len(requests) :], strict=True
        ):
            embeds, negative_embeds = _filled_up(positive[0], negative[0], empty)
            pooled, negative_pooled = positive[1], negative[1]
            if not words:
                negative_embeds, negative_pooled = embeds.new_zeros(embeds.shape), pooled.new_zeros(pooled.shape)
            size = _whole_picture(request, embeds)
            pairs.append(
                (
                    Conditions(embeds, {"text_embeds": pooled, "time_ids": size}),
                    Conditions(negative_embeds, {"text_embeds": negative_pooled, "time_ids": size}),
                )
            )
        return pairs

    def _read(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """For each text ([L,D], [P])."""
        import torch

        parts = self.parts
        first = read_prompts(parts.text_encoder, parts.tokenizer, texts, read_penultimate, self.clip_skip)
        second = read_prompts(parts.text_encoder_2, parts.tokenizer_2, texts, read_penultimate, self.clip_skip)
        result = []
        for one, two in zip(first, second, strict=True):
            assert two.pooled is not None, "the second text encoder has a projection"
            result.append((torch.cat([one.embeds, two.embeds], dim=-1), two.pooled))
        return result


def conditioner_of(parts: Parts, clip_skip: int = 1) -> Conditioner:
    """What makes conditions for a model of these parts."""
    return OneTextEncoder(parts, clip_skip) if parts.text_encoder_2 is None else TwoTextEncoders(parts, clip_skip)


def unet_arguments(conditions: Sequence[Conditions], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Conditions of one length, stacked, by the names of the U-Net's arguments."""
    import torch

    embeds = torch.stack([each.embeds for each in conditions]).to(device, dtype)
    arguments: dict[str, Any] = {"encoder_hidden_states": embeds}
    if conditions[0].added:
        arguments["added_cond_kwargs"] = {
            name: torch.stack([each.added[name] for each in conditions]).to(device) for name in conditions[0].added
        }
    return arguments


def _prompts(requests: Sequence[SampleRequest]) -> list[str]:
    return [parse_prompt(request.prompt).text for request in requests]


def _negatives(requests: Sequence[SampleRequest]) -> list[str]:
    return [parse_prompt(request.negative_prompt).text for request in requests]


def _filled_up(one: Tensor, other: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Both as long as the longer one, with empty pieces."""
    import torch

    length = max(len(one), len(other))
    first, second = (torch.cat([e] + [empty] * ((length - len(e)) // len(empty))) for e in (one, other))
    return first, second


def _whole_picture(request: SampleRequest, like: Tensor) -> Tensor:
    """[6] the size and crop of a picture that was never larger: (height, width, 0, 0, height, width)."""
    import torch

    size = [request.height, request.width]
    return torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=like.device)
