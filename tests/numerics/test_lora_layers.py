"""Our LoRA layers against PEFT's on the same weights: outputs, gradients, and files of one loaded by the other."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from torch import nn

from lora_scripts.adapters.lora import attach

RANK, ALPHA = 4, 6.0


class Net(nn.Module):
    """[B,4,8,8] -> [B,16,8]; a 3x3 convolution with stride, a 1x1 one, linear layers with and without bias."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(4, 16, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.proj = nn.Conv2d(16, 12, 1)
        self.to_q = nn.Linear(12, 20)
        self.to_out = nn.Linear(20, 8, bias=False)

    def forward(self, x):
        x = self.proj(torch.tanh(self.mid(torch.tanh(self.down(x)))))
        return self.to_out(torch.tanh(self.to_q(x.flatten(2).transpose(1, 2))))


NAMES = ["down", "mid", "proj", "to_q", "to_out"]


def pair(net, names, dropout=0.0):
    """The same model with our adapter and with PEFT's, holding the same weights; lora_B is not zero."""
    theirs = inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=names), copy.deepcopy(net)
    )
    adapter = attach({"unet": net}, {"unet": names}, rank=RANK, alpha=ALPHA, dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            layer.lora_B.copy_(0.2 * torch.randn(layer.lora_B.shape, generator=generator))
            other = theirs.get_submodule(name.removeprefix("unet."))
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
    return adapter, theirs


def peft_gradients(theirs, adapter):
    for name, layer in adapter.layers.items():
        other = theirs.get_submodule(name.removeprefix("unet."))
        yield name, layer.lora_A.grad, other.lora_A["default"].weight.grad
        yield name, layer.lora_B.grad, other.lora_B["default"].weight.grad


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_peft(memory_format):
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    adapter, theirs = pair(net, NAMES)
    x = torch.randn(3, 4, 8, 8).to(memory_format=memory_format)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours_out, theirs_out = net(x_ours), theirs(x_theirs)
    torch.testing.assert_close(ours_out, theirs_out, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(ours_out)
    (ours_out * weight).sum().backward()
    (theirs_out * weight).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-5, rtol=1e-4)
    for name, ours_grad, theirs_grad in peft_gradients(theirs, adapter):
        torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_is_that_of_peft():
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    _, theirs = pair(net, ["to_q", "down"], dropout=0.3)
    x = torch.randn(3, 4, 8, 8)
    theirs.train()
    torch.manual_seed(11)
    ours_out = net(x)
    torch.manual_seed(11)
    torch.testing.assert_close(ours_out, theirs(x), atol=1e-6, rtol=1e-5)


def test_half_precision_is_as_near_to_the_exact_result_as_peft_is():
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    adapter, theirs = pair(net, NAMES)
    exact = copy.deepcopy(theirs)
    net.to(torch.bfloat16)
    for name in NAMES:
        theirs.get_submodule(name).base_layer.to(torch.bfloat16)
    x = torch.randn(8, 4, 8, 8)
    errors = {}
    for kind, model, dtype in [
        ("exact", exact, torch.float32),
        ("peft", theirs, torch.bfloat16),
        ("ours", net, torch.bfloat16),
    ]:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "peft"):
            out = model(x.to(dtype))
        out.float().square().sum().backward()
        errors[kind] = out.float()
    exact_grads = [theirs_grad for _, _, theirs_grad in peft_gradients(exact, adapter)]
    ours_error = (errors["ours"] - errors["exact"]).norm() / errors["exact"].norm()
    peft_error = (errors["peft"] - errors["exact"]).norm() / errors["exact"].norm()
    assert ours_error < 1.5 * peft_error < 0.05
    for (_, ours_grad, theirs_grad), exact_grad in zip(peft_gradients(theirs, adapter), exact_grads, strict=True):
        ours_error = (ours_grad - exact_grad).norm() / exact_grad.norm()
        peft_error = (theirs_grad - exact_grad).norm() / exact_grad.norm()
        assert ours_error < 2 * peft_error + 0.005


@pytest.mark.parametrize(("init", "peft_init"), [("kaiming", True), ("gaussian", "gaussian")])
def test_initial_weights_are_spread_as_those_of_peft(init, peft_init):
    torch.manual_seed(0)
    net = nn.ModuleDict({"to_q": nn.Linear(320, 320), "conv": nn.Conv2d(64, 64, 3)}).requires_grad_(False)
    settings = LoraConfig(r=16, target_modules=["to_q", "conv"], init_lora_weights=peft_init)
    theirs = inject_adapter_in_model(settings, copy.deepcopy(net))
    adapter = attach({"unet": net}, {"unet": ["to_q", "conv"]}, rank=16, alpha=16.0, init=init)
    for name, tensors in adapter.weights().items():
        other = theirs.get_submodule(name.removeprefix("unet.")).lora_A["default"].weight.detach()
        assert tensors.lora_A.shape == other.shape
        assert float(tensors.lora_A.std()) == pytest.approx(float(other.std()), rel=0.05)
        assert float(tensors.lora_A.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.2)


def test_our_weights_loaded_by_peft_give_our_output():
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    blank = get_peft_model(copy.deepcopy(net), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=NAMES))
    adapter, _ = pair(net, NAMES)
    state = {}
    for name, tensors in adapter.weights().items():
        path = name.removeprefix("unet.")
        state[f"base_model.model.{path}.lora_A.weight"] = tensors.lora_A
        state[f"base_model.model.{path}.lora_B.weight"] = tensors.lora_B
    result = set_peft_model_state_dict(blank, state)
    assert not result.unexpected_keys
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(blank(x), net(x), atol=1e-6, rtol=1e-5)
        merged = blank.merge_and_unload()
        torch.testing.assert_close(merged(x), net(x), atol=1e-5, rtol=1e-4)
    for name, tensors in adapter.weights().items():
        path = name.removeprefix("unet.")
        change = merged.get_submodule(path).weight - net.get_submodule(path).base.weight
        torch.testing.assert_close(tensors.delta(), change, atol=1e-6, rtol=1e-4)


INITS = {"lora": "gaussian", "pissa": "pissa"}


@pytest.mark.parametrize("kind", INITS)
def test_a_pointwise_convolution_computes_rows_of_pixels_as_it_does_planes(kind):
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj_in": nn.Conv2d(12, 20, 1)}).requires_grad_(False)
    adapter = attach({"unet": net}, {"unet": ["proj_in"]}, rank=3, alpha=6.0, init=INITS[kind])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    planes, grad = torch.randn(2, 12, 6, 5), torch.randn(2, 20, 6, 5)
    rows = planes.contiguous(memory_format=torch.channels_last)
    assert [net["proj_in"]._can_fuse(x) for x in (rows, planes)] == [True, False]

    def passed(x):
        x = x.detach().requires_grad_()
        out = net["proj_in"](x)
        return [out.detach(), *torch.autograd.grad(out, [x, *adapter.parameters()], grad)]

    torch.testing.assert_close(passed(rows), passed(planes), atol=1e-5, rtol=1e-5)
    assert net["proj_in"](rows).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "side by side"])
def test_tiny_unet_with_checkpointing_gives_the_gradients_of_peft(layout):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
    adapter, theirs = pair(unet, names)
    unet.to(memory_format=layout).enable_gradient_checkpointing()
    unet.train()
    sample, text = torch.randn(2, 4, 8, 8).contiguous(memory_format=layout), torch.randn(2, 5, 12)
    timesteps = torch.tensor([10, 700])
    ours_out = unet(sample, timesteps, text).sample
    theirs_out = theirs(sample, timesteps, text).sample
    torch.testing.assert_close(ours_out, theirs_out, atol=1e-5, rtol=1e-4)
    ours_out.square().mean().backward()
    theirs_out.square().mean().backward()
    assert adapter.num_layers == sum("lora_A.default.weight" in name for name, _ in theirs.named_parameters())
    for name, ours_grad, theirs_grad in peft_gradients(theirs, adapter):
        torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
