import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_scripts.adapters.lora import LoRAConv2d, LoRALinear, attach
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.errors import ConfigError, ModelError, ResumeError, TargetError


class Net(nn.Module):
    """[B,4,6,6] -> [B,36,10]: convolutions and linear layers, plain and stacked."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.proj = nn.Conv2d(16, 16, 1)
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(16, 16)}) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(16, 10, bias=False)])

    def forward(self, x):
        x = self.proj(torch.tanh(self.conv(x))).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + torch.tanh(block["to_q"](x))
        return self.out[0](x)


ALL = ["conv", "proj", "to_q", "out.0"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def put_on(net, names=ALL, *, rank=4, alpha=2.0, dropout=0.0, seed=7, train=True):
    adapter = attach({"unet": net}, {"unet": names}, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
    if train:
        fill(adapter)
    return adapter


def fill(adapter, seed=3):
    """Gives every lora_B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))


def pictures(dtype=torch.float32):
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(5)).to(dtype)


def test_new_adapter_changes_nothing(net):
    before = net(pictures())
    put_on(net, train=False)
    torch.testing.assert_close(net(pictures()), before, atol=1e-6, rtol=0)


def test_adapter_takes_the_place_of_the_layers_and_names_them(net):
    adapter = put_on(net)
    assert list(adapter.layers) == ["unet.conv", "unet.proj", "unet.blocks.0.to_q", "unet.blocks.1.to_q", "unet.out.0"]
    assert isinstance(net.conv, LoRAConv2d)
    assert isinstance(net.out[0], LoRALinear)
    assert adapter.num_layers == 5
    assert adapter.num_parameters == sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_output_is_that_of_the_summed_weights(net):
    merged = copy.deepcopy(net)
    adapter = put_on(net)
    for name, tensors in adapter.weights().items():
        merged.get_submodule(name.removeprefix("unet.")).weight += tensors.delta()
    torch.testing.assert_close(net(pictures()), merged(pictures()), atol=1e-5, rtol=1e-5)


def test_initial_values_depend_on_seed_and_name_alone(net):
    every = put_on(copy.deepcopy(net), train=False).weights()
    torch.randn(9)
    some = put_on(copy.deepcopy(net), ["out.0", "to_q"], train=False).weights()
    other = put_on(copy.deepcopy(net), seed=8, train=False).weights()
    for name in some:
        assert torch.equal(some[name].lora_A, every[name].lora_A)
        assert not torch.equal(other[name].lora_A, every[name].lora_A)
    assert not torch.equal(every["unet.blocks.0.to_q"].lora_A, every["unet.blocks.1.to_q"].lora_A)


def test_initial_values_are_normal_with_a_spread_of_one_over_the_rank(net):
    tensors = put_on(net, train=False).weights()["unet.conv"]
    assert tensors.lora_A.std() == pytest.approx(1 / tensors.rank, rel=0.15)
    assert tensors.lora_A.abs().max() > 2 / tensors.rank
    assert not tensors.lora_B.any()


def test_kaiming_values_are_uniform_within_the_bound(net):
    adapter = attach({"unet": net}, {"unet": ["conv"]}, rank=4, alpha=4.0, init="kaiming")
    tensors = adapter.weights()["unet.conv"]
    bound = (4 * 3 * 3) ** -0.5
    assert tensors.lora_A.abs().max() <= bound
    assert tensors.lora_A.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not tensors.lora_B.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_float32_parameters_and_gradients(net, dtype):
    adapter = put_on(net)
    exact = net(pictures())
    net.to(dtype)
    out = net(pictures(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
    out.float().square().sum().backward()
    for _, parameter in adapter.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


def test_changing_the_models_dtype_does_not_round_trained_weights(net):
    adapter = put_on(net)
    before = adapter.weights()
    net.half().float()
    after = adapter.weights()
    assert all(torch.equal(before[n].lora_A, after[n].lora_A) for n in before)
    assert all(torch.equal(before[n].lora_B, after[n].lora_B) for n in before)


def test_only_the_adapter_gets_gradients(net):
    adapter = put_on(net)
    net(pictures()).sum().backward()
    own = {id(p) for p in adapter.parameters()}
    assert all((p.grad is not None) == (id(p) in own) for p in net.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(net, use_reentrant):
    adapter = put_on(net)
    x = pictures().requires_grad_()
    net(x).square().sum().backward()
    wanted = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    checkpoint(net, x, use_reentrant=use_reentrant).square().sum().backward()
    for parameter, grad in zip(adapter.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_channels_last_gives_the_same_output_and_gradients(net):
    adapter = put_on(net)
    out = net(pictures())
    out.square().sum().backward()
    wanted = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    net.to(memory_format=torch.channels_last)
    again = net(pictures().to(memory_format=torch.channels_last))
    again.square().sum().backward()
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-5)
    for parameter, grad in zip(adapter.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)


def test_linear_gradients_agree_with_finite_differences():
    layer = LoRALinear(nn.Linear(5, 4, dtype=torch.float64), 2, 3.0, 0.0)
    with torch.no_grad():
        layer.lora_A.uniform_(-1, 1)
        layer.lora_B.uniform_(-1, 1)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    # The parameters are float32 by design, so only the gradient of the input can be probed at 1e-6.
    assert torch.autograd.gradcheck(layer, (x,))


def test_dropout_acts_in_training_and_not_in_previews(net):
    adapter = put_on(net, dropout=0.5)
    assert not torch.equal(net(pictures()), net(pictures()))
    with adapter.strength(1.0):
        shown = net(pictures())
        assert torch.equal(shown, net(pictures()))
    for layer in adapter.layers.values():
        layer.dropout = 0.0
    torch.testing.assert_close(shown, net(pictures()), atol=1e-5, rtol=1e-5)


def test_strength_scales_the_change_and_comes_back(net):
    original = net(pictures())
    adapter = put_on(net, ["out.0"])
    full = net(pictures())
    with adapter.strength(0.5):
        half = net(pictures())
    torch.testing.assert_close(half, (original + full) / 2, atol=1e-5, rtol=1e-5)
    assert torch.equal(net(pictures()), full)


def test_disabled_is_the_original_model_even_after_an_error(net):
    original = net(pictures())
    adapter = put_on(net)
    full = net(pictures())
    with adapter.disabled():
        assert torch.equal(net(pictures()), original)
    with pytest.raises(TypeError), adapter.disabled():
        net("not a picture")
    assert torch.equal(net(pictures()), full)


def test_detach_restores_the_very_modules(net):
    modules = dict(net.named_modules())
    adapter = put_on(net)
    adapter.detach()
    assert dict(net.named_modules()) == modules
    adapter.detach()
    put_on(net)


def test_second_adapter_on_the_same_component_is_a_fault_of_ours(net):
    put_on(net)
    with pytest.raises(AssertionError, match="unet has an adapter already; detach it first"):
        put_on(net)


def test_hooks_on_the_frozen_layer_are_called(net):
    adapter = put_on(net, ["out.0"])
    wanted = net(pictures())
    seen = []
    net.out[0].base.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(net(pictures()), wanted, atol=1e-5, rtol=1e-5)
    assert seen == [1]
    assert adapter.num_layers == 1


def test_works_under_autocast(net):
    adapter = put_on(net)
    exact = net(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        out = net(pictures())
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
    out.float().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_weights_are_copies(net):
    adapter = put_on(net)
    weights = adapter.weights()
    before = weights["unet.conv"].lora_B.clone()
    with torch.no_grad():
        net.conv.lora_B.zero_()
    assert torch.equal(weights["unet.conv"].lora_B, before)
    assert weights["unet.conv"].alpha == 2.0


def test_weights_go_back_in_to_the_bit(net):
    other = copy.deepcopy(net)
    weights = put_on(net).weights()
    again = put_on(other, seed=99, train=False)
    assert again.load_weights(weights) == []
    assert torch.equal(other(pictures()), net(pictures()))


def test_another_alpha_is_folded_into_the_weights(net):
    other = copy.deepcopy(net)
    weights = put_on(net, alpha=3.0).weights()
    adapter = put_on(other, alpha=7.0, train=False)
    assert adapter.load_weights(weights) == []
    torch.testing.assert_close(other(pictures()), net(pictures()), atol=1e-6, rtol=1e-5)
    assert adapter.weights()["unet.conv"].alpha == 7.0


def test_larger_rank_takes_in_a_smaller_one_without_loss(net):
    other = copy.deepcopy(net)
    weights = put_on(net, rank=2, alpha=3.0).weights()
    adapter = put_on(other, rank=4, alpha=4.0, train=False)
    assert adapter.load_weights(weights) == ["init_lora_weights: 5 layers of rank 2 extended to rank 4, nothing lost."]
    torch.testing.assert_close(other(pictures()), net(pictures()), atol=1e-6, rtol=1e-5)
    other(pictures()).square().sum().backward()
    assert all(layer.lora_B.grad[:, 2:].any() for layer in adapter.layers.values())


def test_smaller_rank_keeps_the_nearest_change_and_says_how_much(net):
    other = copy.deepcopy(net)
    weights = put_on(net, ["out.0"], rank=4).weights()
    adapter = put_on(other, ["out.0"], rank=3, train=False)
    (message,) = adapter.load_weights(weights)
    assert "1 layer of rank 4 cut to rank 3 by SVD, " in message
    difference = adapter.weights()["unet.out.0"].delta() - weights["unet.out.0"].delta()
    smallest = torch.linalg.svdvals(weights["unet.out.0"].delta())[3]
    assert float(difference.norm()) == pytest.approx(float(smallest), rel=1e-3)


def test_weights_of_another_model_are_refused(net):
    adapter = put_on(net)
    tensors = LoRATensors(torch.zeros(2, 3), torch.zeros(3, 2), 1.0)
    with pytest.raises(ModelError, match=r"none of its 1 layers is among the 5 that train here\. It has te\.x; wanted"):
        adapter.load_weights({"te.x": tensors})


def test_weights_of_another_shape_are_refused(net):
    adapter = put_on(net)
    tensors = LoRATensors(torch.zeros(2, 3), torch.zeros(3, 2), 1.0)
    with pytest.raises(ModelError, match=r"unet\.out\.0 changes a weight of \[3, 3\], the model has \[10, 16\]"):
        adapter.load_weights({"unet.out.0": tensors})


def test_layers_that_do_not_train_are_refused_or_told(net):
    other = copy.deepcopy(net)
    weights = put_on(net).weights()
    adapter = put_on(other, ["to_q"], train=False)
    with pytest.raises(ModelError, match=r"3 of its 5 layers do not train here: unet\.conv, unet\.proj, unet\.out\.0"):
        adapter.load_weights(weights)
    (message,) = adapter.load_weights(weights, strict=False)
    assert "3 layers that do not train here left out" in message


def test_layers_missing_from_the_file_are_told(net):
    other = copy.deepcopy(net)
    weights = put_on(net, ["to_q"]).weights()
    (message,) = put_on(other, train=False).load_weights(weights)
    assert message.startswith("init_lora_weights: not in it, so starting new, 3 layers: unet.conv, unet.proj")


def test_state_dict_goes_back_to_the_bit(net):
    other = copy.deepcopy(net)
    state = put_on(net).state_dict()
    adapter = put_on(other, seed=99, train=False)
    adapter.load_state_dict(state)
    assert torch.equal(other(pictures()), net(pictures()))
    assert not any(tensor.requires_grad for tensor in state.values())


def test_state_dict_of_another_adapter_is_refused(net):
    state = put_on(copy.deepcopy(net), ["to_q"]).state_dict()
    with pytest.raises(ResumeError, match=r"its layers are not those of this run: unet\.conv\.lora_A"):
        put_on(net).load_state_dict(state)
    narrower = put_on(Net(), rank=2).state_dict()
    adapter = put_on(Net(), rank=4)
    with pytest.raises(ResumeError, match=r"unet\.conv\.lora_A is \[2, 4, 3, 3\], this run has \[4, 4, 3, 3\]"):
        adapter.load_state_dict(narrower)


def test_groups_are_the_components(net):
    text_encoder = nn.ModuleDict({"q_proj": nn.Linear(6, 6)})
    components = {"unet": net, "text_encoder": text_encoder}
    adapter = attach(components, {"unet": ["to_q"], "text_encoder": ["q_proj"]}, rank=2, alpha=1.0)
    groups = adapter.groups()
    assert {name: len(parameters) for name, parameters in groups.items()} == {"unet": 4, "text_encoder": 2}
    assert sum(len(parameters) for parameters in groups.values()) == len(adapter.parameters())


def test_scale_grads_scales_those_that_are_there(net):
    adapter = put_on(net)
    net(pictures()).sum().backward()
    wanted = [p.grad * 0.25 for p in adapter.parameters()]
    adapter.parameters()[0].grad = None
    adapter.scale_grads(0.25)
    assert adapter.parameters()[0].grad is None
    for parameter, grad in list(zip(adapter.parameters(), wanted, strict=True))[1:]:
        torch.testing.assert_close(parameter.grad, grad)


def test_rank_too_large_names_the_layer_and_the_largest_rank(net):
    with pytest.raises(
        ConfigError,
        match=r"lora_rank: 32 is more than unet\.out\.0 can use \(nor can 4 other layers\); the largest possible rank here is 10\.",
    ):
        put_on(net, rank=32)
    assert type(net.conv) is nn.Conv2d


def test_rank_below_one_is_refused(net):
    with pytest.raises(ConfigError, match="lora_rank: 0 is not a rank"):
        put_on(net, rank=0)


def test_unknown_component_and_unmatched_name_leave_the_model_alone(net):
    with pytest.raises(ConfigError, match="no component 'vae'; this model has unet"):
        attach({"unet": net}, {"vae": ["to_q"]}, rank=2, alpha=1.0)
    with pytest.raises(TargetError, match="to_k"):
        attach({"unet": net}, {"unet": ["to_q", "to_k"]}, rank=2, alpha=1.0)
    assert type(net.blocks[0]["to_q"]) is nn.Linear


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"padding": 2, "dilation": 2, "bias": False},
        {"padding": "same"},
        {"padding": (1, 0), "padding_mode": "reflect"},
    ],
)
def test_convolution_has_the_geometry_of_its_base(options):
    torch.manual_seed(0)
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, **options)}).requires_grad_(False)
    merged = copy.deepcopy(net)
    adapter = put_on(net, ["conv"])
    merged["conv"].weight += adapter.weights()["unet.conv"].delta()
    torch.testing.assert_close(net["conv"](pictures()), merged["conv"](pictures()), atol=1e-5, rtol=1e-5)
