"""What every kind of adapter promises: the original model at strength 0, whole states, exact resume, one file form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_scripts.adapters.lora import Adapter, attach
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import ConfigError
from lora_scripts.training.lora_plus import parameter_groups

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pissa": {"init": "pissa"},
    "dora": {"kind": "dora"},
    "locon": {"kind": "locon", "conv_rank": 2},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr", "lokr_factor": 2, "rank": 2},
    "lokr of whole factors": {"kind": "lokr"},
    "oft": {"kind": "oft"},
}
LOW_RANK = ("lora", "rslora", "pissa", "dora", "locon")
every_kind = pytest.mark.parametrize("kind", KINDS)
NAMES = ["conv", "inner", "out"]


class Net(nn.Module):
    """[B,4,6,6] -> [B,36,10], with a convolution, a linear layer with bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1, stride=1)
        self.inner = nn.Linear(12, 16)
        self.out = nn.Linear(16, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2)
        result: Tensor = self.out(torch.tanh(self.inner(x)))
        return result


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def settings(kind: str) -> dict[str, Any]:
    return {"rank": 4, "alpha": 6.0} | KINDS[kind]


def put_on(net: nn.Module, kind: str, *, train: bool = True, dropout: float = 0.0, seed: int = 7) -> Adapter:
    adapter = attach({"net": net}, {"net": NAMES}, dropout=dropout, seed=seed, **settings(kind))
    if train:
        disturb(adapter)
    return adapter


def disturb(adapter: Adapter) -> None:
    """Moves every trainable tensor, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def pictures(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(5)).to(dtype)


@every_kind
def test_new_adapter_changes_nothing(net: Net, kind: str) -> None:
    before = net(pictures())
    put_on(net, kind, train=False)
    torch.testing.assert_close(net(pictures()), before, atol=1e-6, rtol=1e-5)


@every_kind
def test_stated_change_is_what_the_model_does(net: Net, kind: str) -> None:
    merged = copy.deepcopy(net)
    adapter = put_on(net, kind)
    for name, tensors in adapter.weights().items():
        layer = merged.get_submodule(name.removeprefix("net."))
        layer.weight += tensors.delta(adapter.base_weight(name))
    torch.testing.assert_close(net(pictures()), merged(pictures()), atol=1e-5, rtol=1e-5)
    adapter.detach()
    assert (net(pictures()) - merged(pictures())).abs().max() > 0.05


@every_kind
def test_disabled_and_detached_are_the_original_model_to_the_bit(net: Net, kind: str) -> None:
    original, weights = net(pictures()), copy.deepcopy(net.state_dict())
    adapter = put_on(net, kind)
    assert not torch.equal(net(pictures()), original)
    with adapter.disabled():
        assert torch.equal(net(pictures()), original)
    adapter.detach()
    assert torch.equal(net(pictures()), original)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


@every_kind
@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_strength_scales_the_change_of_the_weight(net: Net, kind: str, strength: float) -> None:
    merged = copy.deepcopy(net)
    adapter = put_on(net, kind)
    for name, tensors in adapter.weights().items():
        merged.get_submodule(name.removeprefix("net.")).weight += strength * tensors.delta(adapter.base_weight(name))
    full = net(pictures())
    with adapter.strength(strength):
        torch.testing.assert_close(net(pictures()), merged(pictures()), atol=1e-5, rtol=1e-5)
    assert torch.equal(net(pictures()), full)


@every_kind
def test_state_goes_into_a_fresh_adapter_of_another_seed_to_the_bit(net: Net, kind: str) -> None:
    other = copy.deepcopy(net)
    state = {name: value.clone() for name, value in put_on(net, kind).state_dict().items()}
    again = put_on(other, kind, train=False, seed=99)
    for layer in again.layers.values():  # as if the decomposition had come out otherwise on this machine
        for value in layer.state().values():
            value.add_(1.0)
    again.load_state_dict(state)
    assert torch.equal(other(pictures()), net(pictures()))
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@every_kind
def test_first_layer_trains_when_neither_its_input_nor_its_weight_has_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"inner": nn.Linear(12, 16)})
    adapter = attach({"net": net}, {"net": ["inner"]}, **settings(kind))
    disturb(adapter)
    x = torch.randn(3, 12)
    net["inner"](x).square().sum().backward()
    assert x.grad is None
    assert net["inner"].base.weight.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())


@every_kind
def test_gradients_are_those_of_plain_operations(net: Net, kind: str) -> None:
    adapter = put_on(net, kind)
    net(pictures()).square().sum().backward()
    wanted = [parameter.grad for parameter in adapter.parameters()]
    adapter.zero_grad()
    for layer in adapter.layers.values():
        layer._plain = False
    net(pictures()).square().sum().backward()
    for parameter, grad in zip(adapter.parameters(), wanted, strict=True):
        assert grad is not None
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)


@every_kind
def test_half_precision_rounds_the_frozen_weights_alone(net: Net, kind: str) -> None:
    adapter = put_on(net, kind)
    exact = net(pictures())
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    net.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())
    out = net(pictures(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in adapter.parameters())


@every_kind
def test_moving_the_model_reaches_every_tensor(net: Net, kind: str) -> None:
    put_on(net, kind)
    reached: set[int] = set()

    def move(tensor: Tensor) -> Tensor:
        reached.add(tensor.data_ptr())
        return tensor

    net._apply(move)
    assert reached == {tensor.data_ptr() for tensor in [*net.parameters(), *net.buffers()]}


@every_kind
def test_gradient_checkpointing_gives_the_same_gradients(net: Net, kind: str) -> None:
    adapter = put_on(net, kind)
    x = pictures().requires_grad_()
    net(x).square().sum().backward()
    wanted = [parameter.grad for parameter in adapter.parameters()]
    adapter.zero_grad()
    checkpoint(net, x, use_reentrant=False).square().sum().backward()
    for parameter, grad in zip(adapter.parameters(), wanted, strict=True):
        assert grad is not None
        torch.testing.assert_close(parameter.grad, grad)


@every_kind
def test_dropout_is_off_in_previews(net: Net, kind: str) -> None:
    adapter = put_on(net, kind, dropout=0.5)
    assert not torch.equal(net(pictures()), net(pictures()))
    with adapter.strength(1.0):
        shown = net(pictures())
        assert torch.equal(shown, net(pictures()))
    for layer in adapter.layers.values():
        layer.dropout = 0.0
    torch.testing.assert_close(shown, net(pictures()), atol=1e-5, rtol=1e-5)


@every_kind
def test_works_under_autocast(net: Net, kind: str) -> None:
    adapter = put_on(net, kind)
    exact = net(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        out = net(pictures())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.1, rtol=0.05)
    out.float().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@every_kind
def test_training_goes_on_from_an_older_lora(net: Net, kind: str) -> None:
    other = copy.deepcopy(net)
    older = put_on(other, kind if kind not in LOW_RANK or kind == "locon" else "lora").weights()
    adapter = put_on(net, kind, train=False, seed=99)
    assert adapter.load_weights(older) == []
    torch.testing.assert_close(net(pictures()), other(pictures()), atol=1e-5, rtol=1e-5)


def test_rslora_scale_is_alpha_over_the_root_of_the_rank(net: Net) -> None:
    tensors = put_on(net, "rslora").weights()["net.inner"]
    assert tensors.scale == pytest.approx(6.0 / 4**0.5)


def test_pissa_trains_the_principal_part_of_every_weight(net: Net) -> None:
    for name, layer in put_on(net, "pissa", train=False).layers.items():
        weight = net.get_submodule(name.removeprefix("net.")).base.weight.flatten(1)
        principal = layer.scale * layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)
        rest = torch.linalg.svdvals((weight - principal).detach())
        torch.testing.assert_close(rest[:-4], torch.linalg.svdvals(weight)[4:], atol=1e-5, rtol=1e-4)


def test_untrained_pissa_states_no_change(net: Net) -> None:
    weights = put_on(net, "pissa", train=False).weights()
    assert all(tensors.rank == 8 and not tensors.delta().any() for tensors in weights.values())


def test_pissa_change_survives_half_precision(net: Net) -> None:
    """The matrices are large and the change is small: written as their difference it would be lost in rounding."""
    adapter = put_on(net, "pissa", train=False)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for tensors in adapter.weights().values():
        half = LoRATensors(tensors.lora_A.half(), tensors.lora_B.half(), tensors.alpha)
        assert (half.delta() - tensors.delta()).norm() < 2e-3 * tensors.delta().norm()


def test_pissa_takes_the_same_start_whatever_else_is_targeted(net: Net) -> None:
    every = put_on(copy.deepcopy(net), "pissa", train=False).state_dict()
    some = attach({"net": net}, {"net": ["inner"]}, rank=4, alpha=6.0, seed=7, init="pissa").state_dict()
    assert all(torch.equal(every[name], value) for name, value in some.items())


def test_dora_row_lengths_are_the_magnitudes(net: Net) -> None:
    adapter = put_on(net, "dora")
    for name, tensors in adapter.weights().items():
        weight = adapter.base_weight(name)
        rows = (weight + tensors.delta(weight)).flatten(1)
        assert tensors.magnitude is not None
        torch.testing.assert_close(rows.norm(dim=1), tensors.magnitude.abs(), atol=1e-5, rtol=1e-5)


def test_dora_with_pissa_is_refused(net: Net) -> None:
    with pytest.raises(ConfigError, match="lora_init: pissa: not with adapter: dora"):
        attach({"net": net}, {"net": NAMES}, rank=4, alpha=6.0, kind="dora", init="pissa")
    assert type(net.inner) is nn.Linear


@pytest.mark.parametrize("kind", LOW_RANK)
def test_groups_of_rates_hold_every_parameter_once(net: Net, kind: str) -> None:
    adapter = put_on(net, kind)
    (one,) = parameter_groups(adapter, lambda component: 1e-3)
    assert (one.name, one.learning_rate) == ("net", 1e-3)
    assert [id(p) for p in one.parameters] == [id(p) for p in adapter.parameters()]
    slow, fast = parameter_groups(adapter, lambda component: 1e-3, 16.0)
    assert {id(p) for p in slow.parameters} == {id(layer.lora_A) for layer in adapter.layers.values()}
    assert len(slow.parameters) + len(fast.parameters) == len(adapter.parameters())
    assert fast.learning_rate == 16e-3


class Packed(nn.Linear):
    """A layer that keeps its weight as bytes, as quantised ones do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.hidden = layer.weight.detach().clone()
        self.bias = layer.bias
        self.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.hidden, self.bias)


@every_kind
def test_quantised_layer_gets_the_adapter_of_its_dense_one(kind: str) -> None:
    torch.manual_seed(0)
    dense = nn.ModuleDict({"inner": nn.Linear(12, 16), "out": nn.Linear(16, 10, bias=False)}).requires_grad_(False)
    packed = nn.ModuleDict({name: Packed(layer) for name, layer in dense.items()})
    x = torch.randn(5, 12)
    outs = []
    for net in (dense, packed):
        adapter = attach({"net": net}, {"net": ["inner", "out"]}, **settings(kind))
        disturb(adapter)
        outs.append(net["out"](torch.tanh(net["inner"](x))))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
