"""Steps of our adapter and optimizer against PEFT's LoRA with torch's AdamW, and against other reference optimizers."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_scripts.adapters.lora import attach
from lora_scripts.training.optimizers import OptimizerSettings, ParameterGroup, make_optimizer

RANK, ALPHA, RATE = 3, 5.0, 1e-2


def make_pair():
    """A frozen layer with our adapter, and the same with PEFT's and the same initial values."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"to_q": nn.Linear(10, 7), "conv": nn.Conv2d(7, 6, 3)}).requires_grad_(False)
    theirs = inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "conv"]), copy.deepcopy(net)
    )
    adapter = attach({"unet": net}, {"unet": ["to_q", "conv"]}, rank=RANK, alpha=ALPHA)
    with torch.no_grad():
        for name in ("to_q", "conv"):
            theirs[name].lora_A["default"].weight.copy_(net[name].lora_A)
    return net, adapter, theirs


def loss(net, step):
    """[]: squared error on rows and pictures that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(2, 25, 10, generator=generator)
    pictures = net["to_q"](rows).transpose(1, 2).reshape(2, 7, 5, 5)
    return (net["conv"](pictures) - 1).square().mean()


@pytest.mark.parametrize("steps", [1, 10])
def test_adamw_steps_are_those_of_peft_with_torch(steps):
    net, adapter, theirs = make_pair()
    ours = make_optimizer(
        "adamw", [ParameterGroup("unet", adapter.parameters(), RATE)], OptimizerSettings(weight_decay=0.01)
    )
    reference = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=RATE, weight_decay=0.01, foreach=False, fused=False
    )
    for step in range(steps):
        for model, optimizer in [(net, ours), (theirs, reference)]:
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in ("to_q", "conv"):
        torch.testing.assert_close(net[name].lora_A, theirs[name].lora_A["default"].weight, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(net[name].lora_B, theirs[name].lora_B["default"].weight, atol=2e-6, rtol=1e-4)
    assert net["to_q"].lora_B.abs().max() > 0.5 * RATE


def test_accumulated_gradients_scaled_once_are_those_of_the_whole_batch():
    _, adapter, _ = make_pair()
    net = {name.partition(".")[2]: layer for name, layer in adapter.layers.items()}
    rows = torch.randn(4, 10)
    with torch.no_grad():
        net["to_q"].lora_B.uniform_(-0.1, 0.1)
    net["to_q"](rows).square().mean(1).mean().backward()
    whole = [p.grad.clone() for p in (net["to_q"].lora_A, net["to_q"].lora_B)]
    adapter.zero_grad()
    for half in rows.split(2):
        net["to_q"](half).square().mean(1).sum().backward()
    adapter.scale_grads(1 / 4)
    for parameter, grad in zip((net["to_q"].lora_A, net["to_q"].lora_B), whole, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-7, rtol=1e-5)


def test_lion_step_is_the_papers():
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(weight.clone())
    optimizer = make_optimizer("lion", [ParameterGroup("unet", [parameter], 1e-3)], OptimizerSettings(weight_decay=0.1))
    expected, momentum = weight.clone(), torch.zeros(4, 5)
    for step in range(3):
        grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 + step))
        parameter.grad = grad.clone()
        optimizer.step()
        # Chen et al. 2023, arXiv 2302.06675, algorithm 2.
        update = (0.9 * momentum + 0.1 * grad).sign()
        expected = expected - 1e-3 * (update + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * grad
    torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-6)


def test_adafactor_moves_a_zero_matrix_by_the_full_rate():
    # With steps relative to the size of the weights a zero lora_B would hardly move.
    parameter = nn.Parameter(torch.zeros(8, 4))
    optimizer = make_optimizer("adafactor", [ParameterGroup("unet", [parameter], 1e-3)])
    parameter.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(1e-3, rel=0.3)
