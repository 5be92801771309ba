"""LoHa, LoKr and OFT against the layers of PEFT and LyCORIS: outputs and gradients with the same weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from lora_scripts.adapters.lokr import factorised
from lora_scripts.adapters.lora import attach
from lora_scripts.adapters.oft import block_size

RANK, ALPHA = 4, 6.0
LAYERS = {
    "linear": lambda: nn.Linear(24, 40),
    "conv1x1": lambda: nn.Conv2d(24, 40, 1),
    "conv3x3": lambda: nn.Conv2d(24, 40, 3, padding=1, stride=2),
}
KINDS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "loha": (LohaModule, {}, {}),
    "lokr": (LokrModule, {"lokr_factor": 4}, {"factor": 4}),
    "lokr of whole factors": (LokrModule, {"rank": 16, "alpha": 16.0}, {"lora_dim": 16, "alpha": 16.0}),
    "oft": (DiagOFTModule, {}, {"constraint": 0}),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def inputs(layer: nn.Module) -> Tensor:
    shape = (2, 24, 6, 6) if isinstance(layer, nn.Conv2d) else (2, 5, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()


def disturbed(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def ours(layer: nn.Module, kind: str, settings: dict[str, Any]) -> nn.Module:
    net = nn.ModuleDict({"x": layer})
    attach({"net": net}, {"net": ["x"]}, kind=kind.split()[0], **({"rank": RANK, "alpha": ALPHA} | settings))
    return net["x"]


def assert_equal(layer: nn.Module, theirs: Any, reference: dict[str, nn.Parameter], x: Tensor) -> None:
    """Output and all gradients of our layer and of theirs, which takes x."""
    again = x.detach().clone().requires_grad_()
    out, wanted = layer(x), theirs(again)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in layer.trained().items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_lycoris(kind: str, layer: str) -> None:
    torch.manual_seed(0)
    base = LAYERS[layer]().requires_grad_(False)
    module_class, settings, options = KINDS[kind]
    size = {"lora_dim": block_size(40, RANK)} if kind == "oft" else {"lora_dim": RANK}
    theirs = module_class("x", base, **({"alpha": ALPHA} | size | options))
    mine = ours(base, kind, settings)
    x = inputs(base)
    if kind != "oft":
        torch.testing.assert_close(mine(x), base(x), rtol=0, atol=1e-6)
    disturbed(mine.trained())
    reference = dict(theirs.named_parameters())
    assert reference.keys() == mine.trained().keys()
    with torch.no_grad():
        for name, parameter in mine.trained().items():
            reference[name].copy_(parameter)
    assert_equal(mine, theirs, reference, x)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_output_and_gradients_are_those_of_peft(kind: str, layer: str) -> None:
    torch.manual_seed(0)
    base = LAYERS[layer]().requires_grad_(False)
    settings = {"decompose_factor": 4} if kind == "LoKr" else {}
    config = getattr(peft, f"{kind}Config")(r=RANK, alpha=ALPHA, target_modules=["0"], **settings)
    theirs = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    mine = ours(base, kind.lower(), {"lokr_factor": 4} if kind == "LoKr" else {})
    disturbed(mine.trained())
    reference = {name.removesuffix(".default"): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert reference.keys() == mine.trained().keys()
    with torch.no_grad():
        for name, parameter in mine.trained().items():
            reference[name].copy_(parameter)
    assert_equal(mine, theirs, reference, inputs(base))


def test_rotation_is_pefts_on_the_other_side() -> None:
    """PEFT rotates the input of a linear layer; transposed, that is our rotation of the output."""
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=False).requires_grad_(False)
    mine = ours(base, "oft", {})
    disturbed(mine.trained())
    size = mine.rank
    config = peft.OFTConfig(oft_block_size=size, r=0, target_modules=["0"], use_cayley_neumann=False)
    turned = nn.Linear(40, 24, bias=False)
    turned.weight = nn.Parameter(base.weight.T.contiguous())
    theirs = peft.get_peft_model(nn.Sequential(turned), config).base_model.model[0]
    rows, columns = torch.triu_indices(size, size, 1)
    skew = (mine.oft_blocks - mine.oft_blocks.transpose(1, 2)).detach()
    with torch.no_grad():
        # PEFT's exact form turns by (I - Q)(I + Q)^-1 from the right of a row, which is the transpose of ours.
        theirs.oft_R["default"].weight.copy_(-skew[:, rows, columns])
    changed = theirs(torch.eye(40)).detach()
    torch.testing.assert_close(changed, rotated(mine, base.weight), rtol=1e-5, atol=1e-5)


def rotated(layer: Any, weight: Tensor) -> Tensor:
    """R W, where our layer makes R^T W."""
    turned = layer.tensors()
    turned = type(turned)(turned.blocks.transpose(1, 2), turned.alpha, turned.shape)
    return weight + turned.delta(weight)


@pytest.mark.parametrize("size", [40, 64, 320, 640, 768, 1280, 127])
@pytest.mark.parametrize("factor", [None, 2, 4, 7, 8, 16, 100])
def test_factors_are_those_of_lycoris(size: int, factor: int | None) -> None:
    from lycoris.functional import factorization

    assert factorised(size, factor) == factorization(size, -1 if factor is None else factor)


def test_only_the_factors_and_the_input_are_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    base = nn.Linear(256, 256).requires_grad_(False)
    mine = ours(base, "loha", {})
    disturbed(mine.trained())
    x = torch.randn(3, 256, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != base.weight.data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mine(x)
    assert sum(kept) == x.numel() + sum(p.numel() for p in mine.trained().values())
