"""Language models of every family, packed and padded, against transformers' own forward pass of each text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from helpers.tiny_causal_lms import tokenizer
from lora_scripts.adapters.lora import attach
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.families.protocol import Batch
from lora_scripts.training.draws import Draws

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"head_dim": 8, "sliding_window": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral, sliding window": ("Mistral", {"sliding_window": 4}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2, window and softcap": ("Gemma2", WINDOW),
    "gemma3, window": ("Gemma3Text", WINDOW),
    "phi3, fused layers": ("Phi3", {}),
    "phi": ("Phi", {}),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "granite, scaled scores": ("Granite", {"logits_scaling": 3.0}),
    "cohere, scaled scores": ("Cohere", {}),
    "mixtral, experts": ("Mixtral", {"num_local_experts": 4}),
}
LENGTHS = (7, 12, 3)
DRAWS = Draws(0)


def model_of(name: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes})
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():  # so that a mistake is not hidden by answers that are all alike
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.02 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def batch_of(texts: Sequence[torch.Tensor], targets: Sequence[Sequence[int]]) -> Batch:
    places = [torch.tensor(places) for places in targets]
    return Batch(
        {
            "tokens": nn.utils.rnn.pad_sequence(list(texts), batch_first=True),
            "targets": nn.utils.rnn.pad_sequence(places, batch_first=True),
        },
        [],
        [str(i) for i in range(len(texts))],
        filled={"tokens": [len(text) for text in texts], "targets": [len(places) for places in targets]},
    )


def texts_and_targets() -> tuple[list[torch.Tensor], list[list[int]]]:
    torch.manual_seed(1)
    return [torch.randint(3, 120, (length,)) for length in LENGTHS], [[2, 5, 6], [1, 2, 3, 9, 11], [2]]


def own_losses(model: Any, texts: Sequence[torch.Tensor], targets: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Text by text through the model as transformers has it."""
    losses = []
    for text, places in zip(texts, targets, strict=True):
        scores = model(input_ids=text[None]).logits[0].float()
        wanted = torch.tensor(places)
        losses.append(nn.functional.cross_entropy(scores[wanted - 1], text[wanted], reduction="none"))
    return losses


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_batch_is_that_of_its_texts_alone(kind: str, packing: bool) -> None:
    model = model_of(*KINDS[kind])
    family = CausalLanguageModel(model, tokenizer(), packing)
    assert family.packs is packing
    assert not [note for note in family.notes if "own kind" in note or "cannot be packed" in note]
    texts, targets = texts_and_targets()
    expected = own_losses(model, texts, targets)
    loss = family.loss(batch_of(texts, targets), DRAWS)
    assert loss.count == 9
    torch.testing.assert_close(loss.total, torch.cat(expected).sum(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        loss.per_example, torch.stack([losses.mean() for losses in expected]), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("kind", ["llama", "gemma2, window and softcap", "phi3, fused layers"])
def test_gradient_of_a_batch_is_that_of_its_texts_alone(kind: str, checkpointing: bool) -> None:
    model = model_of(*KINDS[kind])
    family = CausalLanguageModel(model, tokenizer())
    adapter = attach(family.components, family.default_targets, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    texts, targets = texts_and_targets()
    torch.cat(own_losses(model, texts, targets)).sum().backward()
    expected = [parameter.grad.clone() for parameter in adapter.parameters()]
    adapter.zero_grad()
    family.set_checkpointing(checkpointing)
    family.loss(batch_of(texts, targets), DRAWS).total.backward()
    for parameter, gradient in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral, sliding window", "gemma"])
def test_last_layer_is_finished_for_trained_tokens_alone(kind: str, packing: bool) -> None:
    model = model_of(*KINDS[kind])
    family = CausalLanguageModel(model, tokenizer(), packing)
    seen: list[int] = []
    for layer in model.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel() // SIZES["hidden_size"]))
    family.loss(batch_of(*texts_and_targets()), DRAWS)
    assert seen == [22 if packing else 36, 9]


def test_layer_that_adds_its_halves_in_its_own_way_is_found_out() -> None:
    model = model_of("Granite", {"residual_multiplier": 0.3})
    assert not CausalLanguageModel(model, tokenizer())._finishes_for_some
    assert CausalLanguageModel(model_of("Granite", {}), tokenizer())._finishes_for_some


def test_model_called_by_others_gives_all_hidden_states() -> None:
    model, other = model_of(*KINDS["llama"]), model_of(*KINDS["llama"])
    CausalLanguageModel(model, tokenizer())
    text = texts_and_targets()[0][0][None]
    assert torch.equal(model(input_ids=text).logits, other(input_ids=text).logits)


def test_no_text_of_a_packed_batch_sees_another() -> None:
    family = CausalLanguageModel(model_of("Llama", {}), tokenizer())
    texts, targets = texts_and_targets()
    before = family.loss(batch_of(texts, targets), DRAWS).per_example
    texts[0] = (texts[0] + 1) % 120
    after = family.loss(batch_of(texts, targets), DRAWS).per_example
    assert before[0] != after[0]
    torch.testing.assert_close(before[1:], after[1:], rtol=0, atol=1e-6)


def test_attention_that_cannot_be_packed_is_found_out_and_padded() -> None:
    sizes = {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4}
    model = model_of("GptOss", sizes)  # its attention has sinks
    family = CausalLanguageModel(model, tokenizer())
    assert not family.packs
    assert any("cannot be packed" in note for note in family.notes)
    texts, targets = texts_and_targets()
    expected = torch.cat(own_losses(model, texts, targets)).sum()
    torch.testing.assert_close(family.loss(batch_of(texts, targets), DRAWS).total, expected, rtol=1e-4, atol=1e-4)


def test_head_that_changes_the_scores_in_its_own_way_is_found_out() -> None:
    class OddHead(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[-1])
            return output

    torch.manual_seed(0)
    model = OddHead(transformers.LlamaConfig(**SIZES)).eval().requires_grad_(False)
    family = CausalLanguageModel(model, tokenizer())
    assert any("head of its own kind" in note for note in family.notes)
    texts, targets = texts_and_targets()
    expected = torch.cat(own_losses(model, texts, targets)).sum()
    torch.testing.assert_close(family.loss(batch_of(texts, targets), DRAWS).total, expected, rtol=1e-5, atol=1e-5)


def test_adapter_on_the_head_counts() -> None:
    model = model_of("Llama", {})
    family = CausalLanguageModel(model, tokenizer())
    texts, targets = texts_and_targets()
    plain = family.loss(batch_of(texts, targets), DRAWS).total
    adapter = attach(family.components, {"language_model": ["lm_head"]}, rank=4, alpha=8, seed=0)
    with torch.no_grad():
        adapter.parameters()[1].normal_(0, 0.5, generator=torch.Generator().manual_seed(5))
    changed = family.loss(batch_of(texts, targets), DRAWS).total
    assert abs(changed - plain) > 1e-3
    expected = torch.cat(own_losses(model, texts, targets)).sum()
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-5)
