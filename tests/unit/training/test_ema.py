"""The moving average of the weights against diffusers' own, in every optimizer's state."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load, save

from lora_scripts.adapters.lora import Adapter, attach
from lora_scripts.training.ema import averages, decay_at, update_average
from lora_scripts.training.optimizers import (
    OptimizerSettings,
    ParameterGroup,
    evaluation_weights,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from lora_scripts.training.snapshot import Snapshot

OPTIMIZERS = ["adamw", "adafactor", "lion", "prodigy"]
KINDS = [("lora", "gaussian"), ("lora", "pissa"), ("dora", "gaussian"), ("loha", "gaussian"), ("lokr", "gaussian"),
         ("oft", "gaussian")]  # fmt: skip


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


def made(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(name, [ParameterGroup("unet", parameters, 1e-2)], OptimizerSettings())


def train(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    decay: float = 0.5,
    after: Callable[[], None] = lambda: None,
) -> None:
    for step in steps:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(optimizer, step, decay)
        after()


def shown(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    with evaluation_weights(optimizer):
        return [p.detach().clone() for p in net.parameters()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("decay", [0.5, 0.999])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_average_is_that_of_diffusers(name: str, decay: float) -> None:
    net = model()
    optimizer = made(name, list(net.parameters()))
    theirs = EMAModel(net.parameters(), decay=decay)
    train(net, optimizer, range(1, 31), decay, after=lambda: theirs.step(net.parameters()))
    for ours, expected in zip(shown(net, optimizer), theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours, expected)
    assert not equal(shown(net, optimizer), [p.detach() for p in net.parameters()])


def test_decay_warms_up_as_that_of_diffusers() -> None:
    theirs = EMAModel([], decay=0.999)
    for step in (1, 2, 3, 10, 100, 5000, 8990, 8991, 100_000):
        assert decay_at(step, 0.999) == theirs.get_decay(step)
    assert decay_at(2, 0.1) == 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_average_does_not_disturb_training(name: str) -> None:
    net, other = model(), model()
    optimizer, plain = made(name, list(net.parameters())), made(name, list(other.parameters()))
    train(net, optimizer, range(1, 7), after=lambda: shown(net, optimizer) and None)
    for step in range(1, 7):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        other(x).square().mean().backward()
        plain.step()
        plain.zero_grad(set_to_none=True)
    assert equal(list(net.parameters()), list(other.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_average_goes_through_a_checkpoint_to_the_bit(name: str) -> None:
    net = model()
    optimizer = made(name, list(net.parameters()))
    train(net, optimizer, range(1, 4))
    tensors, numbers = optimizer_state(optimizer)
    file, text = save({key: value.clone() for key, value in tensors.items()}), json.dumps(numbers, allow_nan=False)
    other = copy.deepcopy(net)
    train(net, optimizer, range(4, 8))
    restored = made(name, list(other.parameters()))
    load_optimizer_state(restored, load(file), json.loads(text))
    train(other, restored, range(4, 8))
    assert equal(shown(net, optimizer), shown(other, restored))


def test_a_weight_that_is_never_trained_is_its_own_average() -> None:
    net = model()
    spare = torch.nn.Parameter(torch.ones(3))
    optimizer = made("adamw", [*net.parameters(), spare])
    train(net, optimizer, range(1, 4))
    assert spare not in averages(optimizer)
    with evaluation_weights(optimizer):
        assert spare.tolist() == [1, 1, 1]
    spare.grad = torch.ones(3)
    optimizer.step()  # an optimizer that found an entry of ours would take it for its own
    update_average(optimizer, 4, 0.5)
    assert torch.equal(averages(optimizer)[spare], spare)


@pytest.mark.parametrize(("kind", "init"), KINDS, ids=lambda value: value)
def test_average_of_every_kind_of_adapter_is_shown_saved_and_gone_back_to(kind: str, init: str) -> None:
    net = model().requires_grad_(False)
    adapter: Adapter = attach({"unet": net}, {"unet": ["0", "2"]}, rank=2, alpha=3, kind=kind, init=init)
    optimizer = made("adamw", adapter.parameters())
    theirs = EMAModel(adapter.parameters(), decay=0.9)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))
    train(net, optimizer, range(1, 11), 0.9, after=lambda: theirs.step(adapter.parameters()))
    raw = net(x)
    with evaluation_weights(optimizer):
        averaged, weights = net(x), adapter.weights()
    assert torch.equal(net(x), raw)

    snapshot = Snapshot.take(adapter, optimizer, torch.amp.GradScaler("cpu", enabled=False), {})
    train(net, optimizer, range(11, 15), 0.9)
    with evaluation_weights(optimizer):
        assert not torch.equal(net(x), averaged)
    snapshot.restore(adapter, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    assert torch.equal(net(x), raw)
    with evaluation_weights(optimizer):
        assert torch.equal(net(x), averaged)

    theirs.copy_to(adapter.parameters())
    torch.testing.assert_close(net(x), averaged)
    expected = adapter.weights()
    for name, change in weights.items():
        base = adapter.base_weight(name)
        torch.testing.assert_close(change.delta(base), expected[name].delta(base), rtol=1e-4, atol=1e-5)
