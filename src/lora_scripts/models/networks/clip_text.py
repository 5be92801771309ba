"""CLIP's text encoder, with or without the projection of the pooled text.

Source: Radford et al. 2021, arXiv 2103.00020, section 2.4. Configuration and names as transformers' CLIPTextModel and
CLIPTextModelWithProjection.

Legend for shapes: B batch, L tokens, D width, P width of the projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.models.networks.network import ModelConfig, Network
from lora_scripts.models.networks.transformer_blocks import run

__all__ = ["CLIPEncoderLayer", "CLIPTextModel", "CLIPTextModelWithProjection", "Read"]

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
OLD_END = 2
"""The number that old configurations give the end mark; the mark is the highest number of a caption then."""


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


class Read(NamedTuple):
    """What a text encoder makes of token ids.

    Attributes:
        last_hidden_state: [B,L,D] behind the final norm.
        pooler_output: [B,D] of it, at the end mark.
        hidden_states: the embeddings and what each layer made of them, without that norm.
        text_embeds: [B,P] the pooled text, projected; None without a projection.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...]
    text_embeds: Tensor | None = None


class _TextEncoder(Network):
    """What both kinds have beside their layers."""

    free = DEFAULTS

    @classmethod
    def can_be(cls, config: Mapping[str, Any]) -> bool:
        # Of what else transformers writes into a configuration, no text encoder makes anything.
        return "text_config" not in config and {**DEFAULTS, **config}["hidden_act"] in ACTIVATIONS


class CLIPTextModel(_TextEncoder):
    """Token ids to embeddings."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.embeddings = CLIPTextEmbeddings(self.config)
        self.encoder = CLIPEncoder(self.config)
        self.final_layer_norm = nn.LayerNorm(self.config.hidden_size, self.config.layer_norm_eps)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> Read:
        """[B,L]; the states of all layers are there either way."""
        states = self.encoder(self.embeddings(input_ids))
        last = self.final_layer_norm(states[-1])
        end = self.config.eos_token_id
        ends = (input_ids if end == OLD_END else (input_ids == end).int()).argmax(dim=-1)
        pooled = last[torch.arange(len(last), device=last.device), ends.to(last.device)]
        return Read(last, pooled, states)


class CLIPTextModelWithProjection(_TextEncoder):
    """Token ids to embeddings, and the whole text in one vector."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.text_model = CLIPTextModel(config)
        self.text_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> Read:
        """[B,L]; the states of all layers are there either way."""
        read: Read = self.text_model(input_ids)
        return read._replace(text_embeds=self.text_projection(read.pooler_output))


class CLIPTextEmbeddings(nn.Module):
    """[B,L] to [B,L,D]: what the token is and where it stands."""

    position_ids: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        length, width = config.max_position_embeddings, config.hidden_size
        # Weights come from a file: no numbers are drawn for them first.
        self.token_embedding = nn.Embedding(config.vocab_size, width, _weight=torch.empty(config.vocab_size, width))
        self.position_embedding = nn.Embedding(length, width, _weight=torch.empty(length, width))
        self.register_buffer("position_ids", torch.arange(length).expand((1, -1)), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_ids[:, : input_ids.shape[-1]]
        embedded: Tensor = self.token_embedding(input_ids) + self.position_embedding(positions)
        return embedded


class CLIPEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B,L,D]: it, and what each layer makes of what is before it."""
        states = [x]
        for layer in self.layers:
            states.append(run(layer, states[-1], again=bool(layer.gradient_checkpointing)))
        return tuple(states)


class CLIPEncoderLayer(nn.Module):
    """Attention to the tokens before, feed-forward; each beside a short cut and behind a norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class CLIPAttention(nn.Module):
    """Multi-head attention of every token to those before it and itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self._heads = config.num_attention_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (layer(x).unflatten(-1, (self._heads, -1)).transpose(1, 2) for layer in layers)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class CLIPMLP(nn.Module):
    """Wide within, with CLIP's or OpenCLIP's activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation_fn = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation_fn(self.fc1(x)))
        return out
