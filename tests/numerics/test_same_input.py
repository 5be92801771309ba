"""Layers that read the same input, computed together: the numbers of the layers one by one, and the same weights and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.tiny_causal_lms import tiny_model, tokenizer
from helpers.trained_family import family_with_adapter, picture_batch, random_adapter
from lora_scripts.adapters.layers import LoRALinear
from lora_scripts.adapters.lora import Adapter, attach
from lora_scripts.adapters.same_input import SameInput
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.families.latent_diffusion import CLIP_ATTENTION
from lora_scripts.families.protocol import Batch
from lora_scripts.training.draws import Draws

DRAWS = Draws(3)


class Attention(nn.Module):
    """Three layers of different widths on one input."""

    def __init__(self, bias: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, width, bias=bias, dtype=dtype) for width in (8, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x).sin(), self.k(x).cos(), self.v(x)], -1)


def pair(bias: bool, **settings: Any) -> list[tuple[Attention, Adapter]]:
    """The same layers twice."""
    found = []
    for _ in range(2):
        model = Attention(bias)
        adapter = attach({"unet": model}, {"unet": ["q", "k", "v"]}, rank=3, alpha=2.0, **settings)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter))
        found.append((model, adapter))
    return found


def grads(model: nn.Module, adapter: Adapter, x: torch.Tensor) -> list[torch.Tensor]:
    out = model(x)
    return [out.detach(), *torch.autograd.grad((out * torch.arange(1.0, 17.0)).sum(), [x, *adapter.parameters()])]


GROUP = [["unet.q", "unet.k", "unet.v"]]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_all_gradients_are_those_of_the_layers_by_themselves(bias: bool, joined: bool) -> None:
    plain, grouped = pair(bias)
    assert grouped[1].compute_together(GROUP, joined=joined) == 1
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    for a, b in zip(grads(*plain, x), grads(*grouped, x), strict=True):
        torch.testing.assert_close(a, b)


def test_joined_weights_are_stored_once_and_stay_what_they_were() -> None:
    (plain, _), (model, adapter) = pair(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter.compute_together(GROUP, joined=True)
    storages = {
        parameter.untyped_storage().data_ptr() for name, parameter in model.named_parameters() if "lora" not in name
    }
    assert len(storages) == 2, "one of weights, one of biases"
    assert model.q.weight.untyped_storage().nbytes() == sum(each.weight.nbytes for each in (model.q, model.k, model.v))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    adapter.detach()
    assert all(
        torch.equal(value, plain.state_dict()[f"{name.replace('.', '.base.')}"])
        for name, value in model.state_dict().items()
    )


def test_a_group_works_out_nothing_twice_and_keeps_nothing() -> None:
    _, (model, adapter) = pair(True)
    adapter.compute_together(GROUP, joined=True)
    calls = []
    outputs = SameInput._outputs

    def counted(self: SameInput, x: torch.Tensor) -> Any:
        calls.append(x)
        return outputs(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SameInput, "_outputs", counted)
        x = torch.randn(2, 6, dtype=torch.float64)
        model(x)
        model(x + 1)
    assert len(calls) == 2
    group = model.q.group
    assert group._input is None
    assert not group._waiting


@pytest.mark.parametrize("state", ["dropout", "hook", "strength", "moved"])
def test_what_a_group_cannot_do_each_layer_does_by_itself(state: str) -> None:
    plain, grouped = pair(True, dropout=0.5) if state == "dropout" else pair(True)
    grouped[1].compute_together(GROUP, joined=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for model, adapter in (plain, grouped):
        torch.manual_seed(2)
        if state == "hook":
            model.k.base.register_forward_hook(lambda module, inputs, out: 2 * out)
        if state == "moved":
            model.to(torch.float32).to(torch.float64)
        with adapter.strength(0.0 if state == "strength" else 1.0):
            model.train(state == "dropout")
            out = model(x)
        found.append([out, *torch.autograd.grad(out.sum(), [x])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft"])
def test_other_kinds_are_not_grouped(kind: str) -> None:
    model = Attention(True, torch.float32)
    adapter = attach({"unet": model}, {"unet": ["q", "k", "v"]}, rank=2, alpha=2.0, kind=kind)
    assert adapter.compute_together(GROUP, joined=True) == 0


def numbers(family: Any, adapter: Adapter, batch: Batch) -> list[torch.Tensor]:
    adapter.zero_grad()
    loss = family.loss(batch, DRAWS).total
    loss.backward()
    return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in adapter.parameters())]


def assert_close(plain: list[torch.Tensor], grouped: list[torch.Tensor]) -> None:
    scale = max(float(tensor.abs().max()) for tensor in plain)
    for a, b in zip(plain, grouped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_unet_gives_the_losses_and_gradients_of_its_layers_by_themselves(checkpointing: bool, tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    family.set_checkpointing(checkpointing)
    batch = family.drawn(picture_batch("a"), DRAWS)
    plain = numbers(family, adapter, batch)
    count = adapter.compute_together(family.same_input(), joined=family.joins_weights)
    assert count == 2 * len(family.blocks())
    layers = [layer for layer in adapter.layers.values() if isinstance(layer, LoRALinear)]
    assert sum(layer.group is not None for layer in layers) == 5 * len(family.blocks())
    assert_close(plain, numbers(family, adapter, batch))


def test_text_encoders_are_grouped(tmp_path: Path) -> None:
    family, _ = family_with_adapter(tmp_path, train_text_encoder=True)
    names = [name for group in family.same_input() for name in group if name.startswith("text_encoder.")]
    assert {name.rpartition(".")[2] for name in names} == set(CLIP_ATTENTION[:3])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_language_model_is_grouped_by_what_it_was_seen_to_read(checkpointing: bool) -> None:
    family = CausalLanguageModel(tiny_model("llama").requires_grad_(False), tokenizer())
    layers = len(family.blocks())
    assert [[name.rpartition(".")[2] for name in group] for group in family.same_input()] == layers * [
        ["q_proj", "k_proj", "v_proj"],
        ["gate_proj", "up_proj"],
    ]
    adapter = random_adapter(family, family.default_targets)
    family.set_checkpointing(checkpointing)
    tokens = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    filled = {"tokens": [9, 6], "targets": [2, 2]}
    batch = Batch({"tokens": tokens, "targets": torch.tensor([[1, 8], [1, 5]])}, [], ["a", "b"], filled=filled)
    plain = numbers(family, adapter, batch)
    assert adapter.compute_together(family.same_input(), joined=family.joins_weights) == 2 * layers
    assert_close(plain, numbers(family, adapter, batch))
