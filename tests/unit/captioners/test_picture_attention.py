"""Cross-attention without keys and values is that with them, and the attention of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.captioners.picture_attention import KeysAndValues, States, picture_attention
from lora_scripts.models.packed_linear import pack_linears

HEADS, WIDTH, STATE, COUNT = 4, 32, 24, 19


def layers(dtype: torch.dtype, bias: bool = True) -> list[Any]:
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        part = nn.Module()
        part.key, part.value = nn.Linear(STATE, WIDTH, bias=bias), nn.Linear(STATE, WIDTH, bias=bias)
        part.num_attention_heads, part.all_head_size = HEADS, WIDTH
        made.append(part.to(dtype))
    return made


def by_formula(layer: Any, states: Tensor, query: Tensor) -> Tensor:
    keys, values = (
        F.linear(states, layer.key.weight, layer.key.bias),
        F.linear(states, layer.value.weight, layer.value.bias),
    )
    split = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (query, keys, values))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("pack", [False, True], ids=["plain weights", "packed weights"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", [States, KeysAndValues])
@torch.inference_mode()
def test_mix_is_that_of_the_formula(kind: type[States | KeysAndValues], bias: bool, pack: bool) -> None:
    parts, states, query = layers(torch.float32, bias), torch.randn(3, COUNT, STATE), torch.randn(3, 2, WIDTH)
    expected = [by_formula(part, states, query) for part in parts]
    for part in parts if pack else []:
        pack_linears(part)
    pictures = kind(parts, states)
    for index, mixed in enumerate(expected):
        torch.testing.assert_close(pictures.mix(index, query), mixed, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_in_bfloat16_neither_way_is_further_from_the_exact_mix() -> None:
    parts, states, query = (
        layers(torch.bfloat16),
        torch.randn(3, COUNT, STATE).bfloat16(),
        torch.randn(3, 1, WIDTH).bfloat16(),
    )
    found = [kind(parts, states).mix(0, query).double() for kind in (States, KeysAndValues)]
    exact = by_formula(parts[0].double(), states.double(), query.double())
    errors = [float((mixed - exact).norm() / exact.norm()) for mixed in found]
    assert max(errors) < 2**-7
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("kind", [States, KeysAndValues])
@torch.inference_mode()
def test_pictures_that_are_kept_answer_as_before(kind: type[States | KeysAndValues]) -> None:
    parts, states, query = layers(torch.float32), torch.randn(4, COUNT, STATE), torch.randn(4, 2, WIDTH)
    pictures, kept = kind(parts, states), torch.tensor([True, False, False, True])
    before = pictures.mix(1, query)
    pictures.keep(kept)
    torch.testing.assert_close(pictures.mix(1, query[kept]), before[kept])


def test_keys_and_values_are_projected_where_there_are_many_queries_and_off_a_cpu() -> None:
    parts, states = layers(torch.float32), torch.randn(1, COUNT, STATE)
    assert isinstance(picture_attention(parts, states, WIDTH // HEADS), States)
    assert isinstance(picture_attention(parts, states, WIDTH // HEADS + 1), KeysAndValues)
    halves = [part.half() for part in parts]
    assert isinstance(picture_attention(halves, states.half(), 1), KeysAndValues)
