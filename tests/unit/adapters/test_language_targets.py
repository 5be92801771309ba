"""Which layers of a language model are trained when the user names none; models of the real classes, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_scripts.adapters.lora import attach
from lora_scripts.adapters.targets import language_model_targets, match_layers
from lora_scripts.errors import TargetError

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
GATED = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def build(kind: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "more", "names"),
    [
        ("Llama", {}, GATED),
        ("Llama", {"tie_word_embeddings": True}, GATED),
        ("Qwen2", {}, GATED),
        ("Mistral", {"head_dim": 4}, GATED),
        ("Gemma2", {"head_dim": 4}, GATED),
        ("Phi3", {}, ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")),
        ("GPTNeoX", {}, ("dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_linear_layers_but_the_head_are_targets(kind: str, more: dict[str, Any], names: tuple[str, ...]) -> None:
    model = build(kind, **more)
    targets = language_model_targets(model)
    assert targets.names == names
    assert targets.notes == ()
    matched = match_layers("language_model", model, targets.names)
    head = model.get_output_embeddings()
    linear = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
    assert matched.keys() == linear


def test_head_is_not_hit_by_a_name_that_it_shares() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.blocks = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2)])
            self.out = nn.ModuleDict({"proj": nn.Linear(4, 8, bias=False)})
            self.out["proj"].weight = self.embed.weight

    model = Twin()
    assert language_model_targets(model).names == ("blocks.0.proj", "blocks.1.proj")


def test_experts_that_are_no_layers_are_left_alone_and_told() -> None:
    model = build("Mixtral", num_local_experts=4)
    targets = language_model_targets(model)
    assert targets.names == ("k_proj", "o_proj", "q_proj", "v_proj")
    (note,) = targets.notes
    assert note.startswith("Left frozen, as they are stacks of experts and no linear layers: experts.")
    attach({"language_model": model}, {"language_model": targets.names}, rank=2, alpha=2.0)


def test_model_of_conv1d_is_refused_with_the_reason() -> None:
    with pytest.raises(
        TargetError, match=r"GPT2LMHeadModel has no linear layer besides its head.*Conv1D.*attn\.c_attn"
    ):
        language_model_targets(build("GPT2", n_embd=16, n_layer=1, n_head=2))
