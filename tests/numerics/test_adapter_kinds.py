"""rsLoRA, PiSSA and DoRA against PEFT: outputs, gradients and a few optimizer steps, on single layers and on a tiny Llama."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_scripts.adapters.lora import Adapter, attach
from lora_scripts.training.lora_plus import parameter_groups
from lora_scripts.training.optimizers import OptimizerSettings, make_optimizer

RANK, ALPHA = 4, 6.0
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"init": "kaiming"}, {}),
    "rslora": ({"init": "kaiming", "use_rslora": True}, {"use_rslora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "rslora + pissa": ({"init": "pissa", "use_rslora": True}, {"init_lora_weights": "pissa", "use_rslora": True}),
    "dora": ({"init": "kaiming", "kind": "dora"}, {"use_dora": True}),
    "rslora + dora": ({"init": "kaiming", "kind": "dora", "use_rslora": True}, {"use_dora": True, "use_rslora": True}),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pair(net: nn.Module, names: list[str], kind: str, dropout: float = 0.0) -> tuple[Adapter, nn.Module]:
    """The same model with our adapter and with PEFT's, holding the same drawn values."""
    ours, peft = KINDS[kind]
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=names, **peft)
    theirs = inject_adapter_in_model(settings, copy.deepcopy(net))
    adapter = attach({"net": net}, {"net": names}, rank=RANK, alpha=ALPHA, dropout=dropout, **ours)
    if "pissa" not in kind:
        with torch.no_grad():
            for name, layer in adapter.layers.items():
                theirs.get_submodule(name.removeprefix("net.")).lora_A["default"].weight.copy_(layer.lora_A)
    return adapter, theirs


def peft_parameters(adapter: Adapter, theirs: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters by our names, in our order."""
    found = {}
    for name, _ in adapter.named_parameters():
        path, _, matrix = name.removeprefix("net.").rpartition(".")
        place = "lora_magnitude_vector" if matrix == "magnitude" else matrix
        found[name] = getattr(theirs.get_submodule(path), place)["default"].weight
    return found


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    out: Tensor = model(input_ids=ids).logits
    return out


def loss(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    return nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_llama_trains_as_with_peft(kind: str) -> None:
    net = llama()
    adapter, theirs = pair(net, LINEAR, kind)
    named = peft_parameters(adapter, theirs)
    optimizers = [torch.optim.AdamW(p, lr=2e-3) for p in (adapter.parameters(), list(named.values()))]
    torch.testing.assert_close(logits(net), logits(theirs), atol=1e-5, rtol=1e-5)
    for step in range(4):
        for model in (net, theirs):
            loss(model).backward()
        if step == 0 and "pissa" not in kind:  # the sign of a pair of singular vectors is free
            for name, parameter in adapter.named_parameters():
                torch.testing.assert_close(parameter.grad, named[name].grad, atol=1e-5, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    before = logits(llama())
    assert (logits(net) - before).abs().max() > 0.05  # there is something to compare
    torch.testing.assert_close(logits(net), logits(theirs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss(net), loss(theirs), atol=1e-5, rtol=0)


class Mixed(nn.Module):
    """[B,4,6,6] -> [B,36,10], with a convolution, a linear layer with bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1)
        self.inner = nn.Linear(12, 16)
        self.out = nn.Linear(16, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        result: Tensor = self.out(torch.tanh(self.inner(x)))
        return result


@pytest.mark.parametrize("kind", ["dora", "rslora + dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_gradients_are_those_of_peft_for_convolutions_and_dropout(kind: str, dropout: float) -> None:
    torch.manual_seed(0)
    net = Mixed().requires_grad_(False)
    names = ["inner", "out"] if dropout else ["conv", "inner", "out"]
    adapter, theirs = pair(net, names, kind, dropout)
    named = peft_parameters(adapter, theirs)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            named[name].copy_(parameter.reshape(named[name].shape))
    net.train()
    theirs.train()
    x = torch.randn(2, 4, 6, 6)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(5)
    ours_out = net(x_ours)
    torch.manual_seed(5)
    theirs_out = theirs(x_theirs)
    torch.testing.assert_close(ours_out, theirs_out, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(ours_out)
    (ours_out * weight).sum().backward()
    (theirs_out * weight).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-5, rtol=1e-4)
    for name, parameter in adapter.named_parameters():
        wanted = named[name].grad
        assert wanted is not None
        torch.testing.assert_close(parameter.grad, wanted.reshape(parameter.shape), atol=2e-5, rtol=1e-4)


def test_pissa_begins_with_pefts_matrices_but_for_their_signs() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"q": nn.Linear(40, 24)})
    adapter, theirs = pair(net, ["q"], "pissa")
    layer, other = adapter.layers["net.q"], theirs.get_submodule("q")
    A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
    torch.testing.assert_close(layer.lora_A.abs(), A.abs(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, B @ A, atol=1e-5, rtol=1e-4)
    residual = layer.base.weight - layer.scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(residual, other.base_layer.weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_lora_plus_steps_are_those_of_peft(kind: str) -> None:
    net = llama()
    adapter, theirs = pair(net, LINEAR, kind)
    theirs.requires_grad_(False)
    for parameter in peft_parameters(adapter, theirs).values():
        parameter.requires_grad_()
    groups = parameter_groups(adapter, lambda component: 1e-3, 16.0)
    assert [(g.name, g.learning_rate) for g in groups] == [("net", 1e-3), ("net_lora_B", 16e-3)]
    ours = make_optimizer("adamw", groups, OptimizerSettings(weight_decay=0.0))
    peft = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    for _ in range(3):
        for model, optimizer in ((net, ours), (theirs, peft)):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(logits(net), logits(theirs), atol=1e-5, rtol=1e-5)
