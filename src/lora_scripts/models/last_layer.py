"""The last layer of a decoder, finished for the tokens that matter alone.

What a token becomes in the last layer is read by the head and by no other token any more. Where half of the tokens are trained,
the feed-forward half of that layer, forward and backward, need not be run for the others. Attention is left whole: the others
are still looked at.

Legend for shapes: B texts, L tokens of each, D width, N chosen tokens.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["KEPT", "can_finish_for_some"]

KEPT = "kept_tokens"
"""Keyword argument of the model's `forward`: [N] the tokens, counted over all B * L, whose last hidden states are wanted."""
_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def can_finish_for_some(model: PreTrainedModel) -> bool:
    """Whether the model is built like Llama; if so, it takes `KEPT` from now on and then gives [1,N,D] hidden states.

    Without that argument it does what it always did. A model may have the parts of Llama and put them together in another
    way, so what comes out has to be compared once.
    """
    layers = getattr(model.base_model, "layers", None)
    if not layers or set(layers[-1]._modules) != _PARTS:
        return False
    layer = layers[-1]
    layer.forward = partial(_forward, layer)
    return True


def _forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """As the `forward` of a decoder layer of transformers' Llama, for [B,L,D] hidden states."""
    kept = kwargs.pop(KEPT, None)
    if kept is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    seen = layer.self_attn(*args, hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
    summed = (hidden_states + seen).flatten(0, 1).index_select(0, kept)[None]
    return summed + layer.mlp(layer.post_attention_layernorm(summed))
