"""Adapters beside frozen layers in 4 and 8 bits, against PEFT on the same layers and against the dequantised weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_scripts.adapters.dense import dense_weight
from lora_scripts.adapters.lora import attach
from lora_scripts.models.int8_linear import Int8Linear
from lora_scripts.models.quantised import Quantization, settle_layers

bnb = pytest.importorskip("bitsandbytes", reason="quantised layers need bitsandbytes")

KINDS: tuple[Quantization, ...] = ("nf4", "int8")
every_kind = pytest.mark.parametrize("kind", KINDS)
IN, OUT = 64, 96


def packed(kind: Quantization, dense: nn.Linear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The layer as bitsandbytes quantises it."""
    layer: nn.Linear
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    else:
        layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu").requires_grad_(False)


def net_of(kind: Quantization, dtype: torch.dtype = torch.float32, bias: float = 1.0) -> tuple[nn.Sequential, Tensor]:
    """A model of one quantised layer, as `load_quantised` leaves it, and the weight that the layer stands for."""
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT)
    dense.bias.data.mul_(bias)
    layer = packed(kind, dense, dtype)
    if kind == "nf4":
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    else:
        weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert 1e-4 < (weight - dense.weight).abs().max() < 0.05
    net = nn.Sequential(layer)
    settle_layers(net)
    net[0].bias.data = net[0].bias.data.to(dtype)
    return net, weight


@every_kind
def test_quantised_layer_multiplies_with_its_dequantised_weight(kind: Quantization) -> None:
    net, weight = net_of(kind)
    x = torch.randn(5, IN, requires_grad=True)
    out = net(x)
    torch.testing.assert_close(out, nn.functional.linear(x, weight, net[0].bias), atol=1e-5, rtol=1e-5)
    grad = torch.randn(5, OUT)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight, atol=1e-5, rtol=1e-5)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_between_steps_change_nothing_in_training(kind: Quantization, dtype: torch.dtype) -> None:
    net, _ = net_of(kind, dtype)
    net.eval()
    x = torch.randn(5, IN, dtype=dtype, requires_grad=True)
    before = net(x)
    with torch.no_grad():
        answer = net(x.detach())
        alone = torch.cat([net(row[None]) for row in x.detach()])
    again = net(x)
    assert torch.equal(again, before)
    torch.testing.assert_close(answer, before, atol=1e-2 if dtype is torch.bfloat16 else 1e-6, rtol=1e-2)
    torch.testing.assert_close(alone, before, atol=1e-2 if dtype is torch.bfloat16 else 1e-6, rtol=1e-2)
    again.float().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@every_kind
def test_lora_gives_what_pefts_gives_on_the_same_layer(kind: Quantization) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT)
    theirs = nn.ModuleDict({"inner": packed(kind, dense)})
    theirs.is_loaded_in_4bit, theirs.is_loaded_in_8bit = kind == "nf4", kind == "int8"  # as transformers marks models
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["inner"]), theirs)
    theirs.train()
    assert type(theirs["inner"]).__module__ == "peft.tuners.lora.bnb"
    ours = nn.ModuleDict({"inner": packed(kind, dense)})
    settle_layers(ours)
    (layer,) = attach({"net": ours}, {"net": ["inner"]}, rank=4, alpha=6.0).layers.values()
    theirs_A, theirs_B = theirs["inner"].lora_A["default"].weight, theirs["inner"].lora_B["default"].weight
    with torch.no_grad():
        layer.lora_B.normal_()
        theirs_A.copy_(layer.lora_A)
        theirs_B.copy_(layer.lora_B)
    x = torch.randn(5, IN, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    out, wanted = ours["inner"](x), theirs["inner"](y)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    wanted.square().sum().backward()
    for mine, other in ((x.grad, y.grad), (layer.lora_A.grad, theirs_A.grad), (layer.lora_B.grad, theirs_B.grad)):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)


@every_kind
def test_weight_is_read_back_beside_a_large_bias(kind: Quantization) -> None:
    net, weight = net_of(kind, torch.bfloat16, bias=3000.0)
    bias = net[0].bias.clone()
    torch.testing.assert_close(dense_weight(net[0]), weight, atol=1e-3, rtol=1e-2)
    assert torch.equal(net[0].bias, bias)


@every_kind
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_adapter_on_a_quantised_layer_is_that_on_its_dequantised_one(kind: Quantization, adapter: str) -> None:
    net, weight = net_of(kind)
    dense = nn.Linear(IN, OUT)
    dense.load_state_dict({"weight": weight, "bias": net[0].bias})
    plain = nn.Sequential(dense).requires_grad_(False)
    x, outs, grads = torch.randn(5, IN), [], []
    for model in (net, plain):
        handle = attach({"net": model}, {"net": ["0"]}, rank=4, alpha=6.0, kind=adapter)  # type: ignore[arg-type]
        (layer,) = handle.layers.values()
        with torch.no_grad():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(2))
        outs.append(model(x))
        outs[-1].square().sum().backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in handle.parameters()]))
        assert torch.allclose(handle.base_weight("net.0"), weight, atol=1e-6)
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


def test_scales_keep_their_precision_when_the_model_changes_its_own() -> None:
    net, _ = net_of("int8")
    scales = net[0].scales.clone()
    net.to(torch.bfloat16)
    assert isinstance(net[0], Int8Linear)
    assert net[0].weight.dtype is torch.int8
    assert net[0].bias.dtype is torch.bfloat16
    assert torch.equal(net[0].scales, scales)
