"""Memory and arithmetic of a language model's passes: predicted against the allocator's record and against the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers.allocator import allocated_peak
from helpers.tiny_causal_lms import tiny_model, tokenizer
from lora_scripts.adapters.lora import Adapter
from lora_scripts.attaching import attach_adapter
from lora_scripts.config import RunConfig
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.families.protocol import Batch
from lora_scripts.planning.activations import trace_pass
from lora_scripts.training.draws import Draws
from lora_scripts.training.events import Events

MARGIN = 0.02
KERNEL_BYTES = 100_000


def with_adapter(model: torch.nn.Module, packing: bool = True) -> tuple[CausalLanguageModel, Adapter]:
    family = CausalLanguageModel(model.eval().requires_grad_(False), tokenizer(), packing)
    config = RunConfig(task_type="text-generation", train_data_dir=Path(), base_model="-", output_dir=Path())
    return family, attach_adapter(family, config, Events())


LAYERS, WIDTH = 8, 512


def llama_model() -> torch.nn.Module:
    """A random Llama of 31 million weights."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def llama() -> tuple[CausalLanguageModel, Adapter]:
    return with_adapter(llama_model())


def batch_of(lengths: tuple[int, ...], untrained: int = 1) -> Batch:
    """Texts whose first `untrained` tokens are not learnt."""
    tokens, targets = torch.zeros(len(lengths), max(lengths), dtype=torch.long), []
    for length in lengths:
        targets.append(torch.arange(untrained, length))
    padded = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)
    filled = {"tokens": list(lengths), "targets": [length - untrained for length in lengths]}
    return Batch({"tokens": tokens, "targets": padded}, [], [str(i) for i in range(len(lengths))], filled=filled)


def taken_by(family: CausalLanguageModel, adapter: Adapter, batch: Batch) -> int:
    """The most bytes that the allocator had handed out during a real forward and backward pass."""

    def step() -> None:
        family.loss(batch, Draws(0)).total.backward()

    step()  # what is made once is made here
    adapter.zero_grad()
    peak = allocated_peak(step)
    adapter.zero_grad()
    return peak


def check(model: tuple[CausalLanguageModel, Adapter], batch: Batch, checkpointing: bool) -> None:
    family, adapter = model
    family.set_checkpointing(checkpointing)
    traced = trace_pass(lambda b: family.loss(b, Draws(0)).total, batch, list(adapter.parameters()))
    family.set_checkpointing(checkpointing)
    taken = taken_by(family, adapter, batch)
    assert traced.peak_bytes <= taken <= (1 + MARGIN) * traced.peak_bytes + KERNEL_BYTES


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lengths", [(120,), (50, 10, 90)], ids=["one text", "three texts"])
def test_predicted_peak_of_packed_texts_is_what_the_allocator_hands_out(
    llama: tuple[CausalLanguageModel, Adapter], lengths: tuple[int, ...], checkpointing: bool
) -> None:
    check(llama, batch_of(lengths, untrained=5), checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
def test_predicted_peak_of_tiny_models_is_what_the_allocator_hands_out(kind: str, checkpointing: bool) -> None:
    check(with_adapter(tiny_model(kind)), batch_of((60, 25, 41)), checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_predicted_peak_of_padded_texts_is_a_little_too_large(checkpointing: bool) -> None:
    """transformers makes a mask for fake tensors that it leaves out for real ones without padding in front."""
    family, adapter = with_adapter(llama_model(), packing=False)
    family.set_checkpointing(checkpointing)
    batch = batch_of((100, 90, 95))
    traced = trace_pass(lambda b: family.loss(b, Draws(0)).total, batch, list(adapter.parameters()))
    taken = taken_by(family, adapter, batch)
    assert 0.88 * traced.peak_bytes <= taken <= (1 + MARGIN) * traced.peak_bytes + KERNEL_BYTES


def test_predicted_arithmetic_is_four_operations_for_each_frozen_weight_and_token(
    llama: tuple[CausalLanguageModel, Adapter],
) -> None:
    family, adapter = llama
    family.set_checkpointing(False)
    tokens, trained = 130, 100
    batch = batch_of((tokens,), untrained=tokens - trained)
    traced = trace_pass(lambda b: family.loss(b, Draws(0)).total, batch, list(adapter.parameters()))
    frozen = sum(layer.base.weight.numel() for layer in adapter.layers.values())
    head = family.model.get_output_embeddings().weight.numel()
    # Forward and backward each: frozen matrices by all tokens, the head by those that are learnt, an adapter's matrices
    # with one more product for their own gradient. Attention: two products forward, five backward.
    matrices = 4 * frozen * tokens + 4 * head * trained + 6 * adapter.num_parameters * tokens
    # The feed-forward half of the last layer is run for learnt tokens alone.
    spared = sum(p.numel() for p in family.model.base_model.layers[-1].mlp.parameters() if not p.requires_grad)
    matrices -= 4 * spared * (tokens - trained)
    attention = 14 * tokens**2 * WIDTH * LAYERS
    assert traced.flops == pytest.approx(matrices + attention, rel=0.02)


def test_parts_of_a_pass_add_up_and_checkpointing_keeps_less_and_computes_more(
    llama: tuple[CausalLanguageModel, Adapter],
) -> None:
    family, adapter = llama
    traces = {}
    for on in (False, True):
        family.set_checkpointing(on)
        traces[on] = trace_pass(lambda b: family.loss(b, Draws(0)).total, batch_of((300,)), list(adapter.parameters()))
    for trace in traces.values():
        assert trace.peak_bytes == trace.kept_bytes + trace.gradient_bytes + trace.momentary_bytes
        assert 0 <= trace.gradient_bytes <= 4 * adapter.num_parameters
        assert trace.momentary_bytes > 0
    assert traces[True].kept_bytes < 0.3 * traces[False].kept_bytes
    assert 1.2 < traces[True].flops / traces[False].flops < 1.6
