"""BLIP's forward pass, arranged for captioning: one encoder pass and one set of cross-attention keys per picture.

The generic generation loop repeats the picture's 577 vision states for each candidate and projects them anew, and it
draws from one random stream for the whole batch. Here the k candidates of a picture are k queries against the same
keys, and each candidate owns its random numbers, so a caption does not depend on its neighbours in the batch.

Legend: B pictures, K candidates per picture, N vision states, L tokens, D width, H heads, V vocabulary.
Source: Li et al. 2022, arXiv 2201.12086; the modules and their order are those of transformers' BLIP, which the tests
compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_scripts.captioners.picture_attention import attend, picture_attention
from lora_scripts.captioners.side_by_side import side_by_side
from lora_scripts.models.tiled_attention import attention

if TYPE_CHECKING:
    from transformers import BlipTextLMHeadModel, BlipVisionModel

__all__ = ["Decoded", "decode", "encode_images"]

_NUCLEUS_CAP = 512
"""Tokens looked at per step when sampling: the 512 likeliest hold more than 0.9 of the mass but for a broken model."""


ENCODED_AT_ONCE = 4
"""Pictures that a CPU encodes at a time: what lies between two layers stays in its cache, and more are no faster."""
ENCODED_BY_A_CORE = 2
"""The same, where each core has its own."""
LARGE_PICTURE = 2**18
"""Numbers between two layers of a picture from which on each core takes its own: with fewer, threads wait for Python."""


@dataclass(frozen=True)
class Decoded:
    """What `decode` returns.

    Attributes:
        tokens: [B,K,L] token ids after the prompt, padded with -1 after the end token, which is left out too.
        log_probs: [B,K] mean log probability per token, the end token counted.
        finished: [B,K] whether the end token came before the limit.
    """

    tokens: Tensor
    log_probs: Tensor
    finished: Tensor


def encode_images(vision_model: BlipVisionModel, pixel_values: Tensor) -> Tensor:
    """[B,N,D] vision states of [B,3,height,width] normalised pixels; the library's own modules, but fused attention."""
    if pixel_values.device.type != "cpu":
        return _encode(vision_model, pixel_values)
    num_shares = torch.get_num_threads()
    config = vision_model.config
    is_large = (config.image_size // config.patch_size) ** 2 * config.hidden_size >= LARGE_PICTURE
    if num_shares == 1 or len(pixel_values) < num_shares or torch.is_grad_enabled() or not is_large:
        return _encode_in_parts(vision_model, pixel_values)
    num_alike = len(pixel_values) // num_shares * num_shares
    shares = pixel_values[:num_alike].chunk(num_shares)
    parts = [part for share in shares for part in torch.split(share, ENCODED_BY_A_CORE)]
    states = side_by_side(partial(_encode, vision_model), parts)
    if num_alike < len(pixel_values):
        states.append(_encode_in_parts(vision_model, pixel_values[num_alike:]))
    return torch.cat(states)


def _encode_in_parts(vision_model: BlipVisionModel, pixel_values: Tensor) -> Tensor:
    parts = torch.tensor_split(pixel_values, -(-len(pixel_values) // ENCODED_AT_ONCE))
    return torch.cat([_encode(vision_model, part) for part in parts])


def _encode(vision_model: BlipVisionModel, pixel_values: Tensor) -> Tensor:
    hidden = vision_model.embeddings(pixel_values)
    for layer in vision_model.encoder.layers:
        own = layer.self_attn
        batch, num_states, width = hidden.shape
        qkv = own.qkv(layer.layer_norm1(hidden))
        query, key, value = qkv.view(batch, num_states, 3, own.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attention(query, key, value)
        hidden = hidden + own.projection(mixed.transpose(1, 2).reshape(batch, num_states, width))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    states: Tensor = vision_model.post_layernorm(hidden)
    return states


@torch.inference_mode()
def decode(
    text_decoder: BlipTextLMHeadModel,
    image_states: Tensor,
    prompt_ids: list[int],
    draws: Tensor,
    *,
    end_id: int,
    min_tokens: int,
    max_tokens: int,
    top_p: float,
) -> Decoded:
    """Captions for B pictures with K candidates each, greedy where `draws` is NaN and nucleus-sampled elsewhere.

    Args:
        image_states: [B,N,D] from `encode_images`.
        prompt_ids: the start token and, if any, the words each caption continues.
        draws: [B,K,max_tokens] uniform numbers in [0, 1), one per token; NaN takes the likeliest token instead.
        end_id: the token that ends a caption; it cannot come before `min_tokens` tokens.
        top_p: nucleus sampling keeps the likeliest tokens that together reach this probability (arXiv 1904.09751).
    """
    batch, num_candidates, _ = draws.shape
    device = image_states.device
    tokens = torch.full((batch, num_candidates, max_tokens), -1, dtype=torch.long, device=device)
    log_probs = torch.zeros(batch, num_candidates, device=device)
    lengths = torch.zeros(batch, num_candidates, device=device)
    finished = torch.zeros(batch, num_candidates, dtype=torch.bool, device=device)
    greedy = torch.isnan(draws[:, :, 0]).to(device)
    sampling = not bool(greedy.all())
    draws = torch.nan_to_num(draws).to(device)

    state = _State(text_decoder, image_states, num_candidates, len(prompt_ids) + max_tokens)
    active = torch.arange(batch, device=device)
    current = torch.full((batch, num_candidates), prompt_ids[0], dtype=torch.long, device=device)
    for token in prompt_ids[1:]:
        state.step(current)
        current = torch.full_like(current, token)
    for step in range(max_tokens):
        logits = state.step(current).float()
        if step < min_tokens:
            logits[:, :, end_id] = -torch.inf
        scores = torch.log_softmax(logits, dim=-1)
        chosen = scores.argmax(dim=-1)
        if sampling:
            chosen = torch.where(greedy[active], chosen, _nucleus(scores, draws[active, :, step], top_p))
        going = ~finished[active]
        log_probs[active] += torch.where(going, scores.gather(-1, chosen[..., None])[..., 0], 0.0)
        lengths[active] += going
        ended = going & (chosen == end_id)
        tokens[active, :, step] = torch.where(going & ~ended, chosen, -1)
        finished[active] |= ended
        current = chosen
        open_pictures = ~finished[active].all(dim=1)
        num_open = int(open_pictures.sum())
        if num_open == 0:
            break
        # Dropping a finished picture copies the keys of the others, so it pays only once many are finished.
        if num_open <= len(active) // 2:
            state.keep(open_pictures)
            active, current = active[open_pictures], current[open_pictures]
    return Decoded(tokens, log_probs / lengths.clamp(min=1), finished)


def _nucleus(scores: Tensor, draws: Tensor, top_p: float) -> Tensor:
    """[B,K] tokens drawn by inverting the cumulative distribution of the likeliest tokens at [B,K] uniform `draws`."""
    values, indices = scores.topk(min(_NUCLEUS_CAP, scores.shape[-1]), dim=-1)
    probabilities = values.exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0.0)
    cumulative = kept.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, draws[..., None] * cumulative[..., -1:], right=True)
    # A draw close to 1 may round up to the total itself: stay on the last token kept.
    last = (kept > 0).sum(dim=-1, keepdim=True) - 1
    return indices.gather(-1, torch.minimum(place, last))[..., 0]


class _State:
    """The keys and values of one decoding batch, and the pass of one token through the decoder."""

    def __init__(
        self, text_decoder: BlipTextLMHeadModel, image_states: Tensor, num_candidates: int, length: int
    ) -> None:
        self.decoder = text_decoder
        self.layers: list[Any] = list(text_decoder.bert.encoder.layer)
        attention = self.layers[0].attention.self
        self.num_heads: int = attention.num_attention_heads
        self.position = 0
        batch, width = image_states.shape[0], attention.all_head_size
        shape = (batch * num_candidates, self.num_heads, length, width // self.num_heads)
        self.own_keys = [image_states.new_empty(shape) for _ in self.layers]
        self.own_values = [image_states.new_empty(shape) for _ in self.layers]
        cross_attentions = [layer.crossattention.self for layer in self.layers]
        self.pictures = picture_attention(cross_attentions, image_states, length * num_candidates)

    def step(self, token_ids: Tensor) -> Tensor:
        """[B,K,V] scores of the next token after adding [B,K] `token_ids` to the texts so far."""
        batch, num_candidates = token_ids.shape
        place = torch.full((1, 1), self.position, dtype=torch.long, device=token_ids.device)
        hidden = self.decoder.bert.embeddings(token_ids.reshape(-1, 1), position_ids=place)
        for index, layer in enumerate(self.layers):
            own = layer.attention.self
            keys, values = self.own_keys[index], self.own_values[index]
            keys[:, :, self.position] = own.key(hidden)[:, 0].unflatten(-1, (self.num_heads, -1))
            values[:, :, self.position] = own.value(hidden)[:, 0].unflatten(-1, (self.num_heads, -1))
            end = self.position + 1
            query = own.query(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            mixed = attend(query, keys[:, :, :end], values[:, :, :end])
            hidden = layer.attention.output(mixed.transpose(1, 2).flatten(2), hidden)
            # The candidates of a picture stand side by side as queries, so its states are read once for all of them.
            query = layer.crossattention.self.query(hidden).view(batch, num_candidates, -1)
            mixed = self.pictures.mix(index, query).reshape(batch * num_candidates, 1, -1)
            hidden = layer.crossattention.output(mixed, hidden)
            hidden = layer.output(layer.intermediate(hidden), hidden)
        self.position += 1
        logits: Tensor = self.decoder.cls(hidden)
        return logits.view(batch, num_candidates, -1)

    def keep(self, pictures: Tensor) -> None:
        """Drop the pictures whose entry in [B] `pictures` is false."""
        rows = pictures.repeat_interleave(self.own_keys[0].shape[0] // pictures.shape[0])
        for store in (self.own_keys, self.own_values):
            store[:] = [tensor[rows] for tensor in store]
        self.pictures.keep(pictures)
