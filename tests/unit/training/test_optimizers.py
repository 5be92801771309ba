import importlib
import json
import re
import sys

import pytest
import schedulefree
import torch
from safetensors.torch import load, save
from torch import nn

from lora_scripts.errors import ConfigError, ResumeError
from lora_scripts.training.optimizers import (
    OPTIMIZERS,
    OptimizerSettings,
    ParameterGroup,
    effective_learning_rates,
    evaluation_weights,
    load_optimizer_state,
    make_optimizer,
    optimizer_advice,
    optimizer_state,
    set_learning_rates,
)

RATES = {"prodigy": 1.0, "lion": 5e-4}
ON_CPU = [name for name in OPTIMIZERS if name != "adamw8bit"]


def model():
    """A stand-in for an adapter: a random matrix and a zero one behind it, per group."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False))
    nn.init.zeros_(net[1].weight)
    return net


def made(name, net, rate=None, **settings):
    rate = rate or RATES.get(name, 1e-2)
    groups = [
        ParameterGroup("unet", [net[0].weight, net[1].weight], rate),
        ParameterGroup("text_encoder", [net[2].weight], rate),
    ]
    return make_optimizer(name, groups, OptimizerSettings(**settings))


def train(net, optimizer, start, stop):
    for step in range(start, stop):
        set_learning_rates(optimizer, 1 - step / 20)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator)
        (net(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("name", ON_CPU)
def test_three_steps_and_three_more_equal_a_restored_three_more(name):
    net = model()
    optimizer = made(name, net)
    train(net, optimizer, 0, 3)
    tensors, numbers = optimizer_state(optimizer)
    file, text = save({key: value.clone() for key, value in tensors.items()}), json.dumps(numbers, allow_nan=False)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    train(net, optimizer, 3, 6)

    other = model()
    other.load_state_dict(weights)
    restored = made(name, other)
    load_optimizer_state(restored, load(file), json.loads(text))
    train(other, restored, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert effective_learning_rates(optimizer) == effective_learning_rates(restored)


@pytest.mark.parametrize("name", ON_CPU)
def test_forgetting_the_state_would_be_noticed(name):
    net, other = model(), model()
    optimizer = made(name, net)
    train(net, optimizer, 0, 3)
    other.load_state_dict(net.state_dict())
    train(net, optimizer, 3, 6)
    train(other, made(name, other), 3, 6)
    assert not all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ON_CPU)
def test_loss_falls(name):
    net = model()
    optimizer = made(name, net, rate=1e-2 if name == "lion" else None)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(9))

    def loss():
        with torch.no_grad(), evaluation_weights(optimizer):
            return float((net(x) - x[:, :5]).square().mean())

    before = loss()
    for _ in range(120):
        (net(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert loss() < 0.8 * before


@pytest.mark.parametrize("name", ON_CPU)
def test_looking_at_the_evaluation_weights_does_not_disturb_training(name):
    net, other = model(), model()
    optimizer, plain = made(name, net), made(name, other)
    train(net, optimizer, 0, 3)
    train(other, plain, 0, 3)
    before = parameters(net)
    with evaluation_weights(optimizer):
        shown = parameters(net)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    same = all(torch.equal(a, b) for a, b in zip(before, shown, strict=True))
    assert same == (name != "adamw_schedulefree")
    train(net, optimizer, 3, 6)
    train(other, plain, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_schedule_free_evaluation_weights_are_the_librarys_average():
    net, other = model(), model()
    optimizer = made("adamw_schedulefree", net)
    reference = schedulefree.AdamWScheduleFree(
        [{"params": list(other.parameters()), "base_lr": 1e-2}], lr=1e-2, weight_decay=0.01
    )
    reference.train()
    train(net, optimizer, 0, 4)
    train(other, reference, 0, 4)
    reference.eval()
    with evaluation_weights(optimizer):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_learning_rates_are_those_of_the_groups_times_the_factor():
    net = model()
    groups = [ParameterGroup("unet", [net[0].weight], 2e-4), ParameterGroup("text_encoder", [net[1].weight], 5e-5)]
    optimizer = make_optimizer("adamw", groups)
    set_learning_rates(optimizer, 0.5)
    assert effective_learning_rates(optimizer) == {"unet": 1e-4, "text_encoder": 2.5e-5}
    set_learning_rates(optimizer, 1.0)
    assert effective_learning_rates(optimizer) == {"unet": 2e-4, "text_encoder": 5e-5}


def test_learning_rate_of_prodigy_has_its_step_size_in_it():
    net = model()
    optimizer = made("prodigy", net)
    # It needs some dozens of steps before its first estimate rises.
    for _ in range(60):
        train(net, optimizer, 0, 1)
    group = optimizer.param_groups[0]
    assert effective_learning_rates(optimizer)["unet"] == group["lr"] * group["d"]
    assert group["d"] > 1e-6


def test_settings_reach_the_optimizer():
    optimizer = made("adamw", model(), weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)
    assert optimizer.param_groups[1]["weight_decay"] == 0.3
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.95)
    assert optimizer.param_groups[1]["eps"] == 1e-6


def test_prodigy_prints_nothing(capfd):
    made("prodigy", model())
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_prodigy_refuses_two_learning_rates():
    net = model()
    groups = [ParameterGroup("unet", [net[0].weight], 1.0), ParameterGroup("text_encoder", [net[1].weight], 0.5)]
    with pytest.raises(
        ConfigError, match=r"text_encoder_learning_rate: prodigy finds one step size for all; 0\.5 and 1 cannot"
    ):
        make_optimizer("prodigy", groups)


def test_unknown_optimizer_is_told_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"optimizer: adamv: no such optimizer\. Did you mean adamw\? Known: adamw, adamw8bit"
    ):
        made("adamv", model())


def test_eight_bit_adamw_without_cuda_says_so():
    with pytest.raises(
        ConfigError, match=r"optimizer: adamw8bit runs on NVIDIA GPUs only, this run is on cpu\. Set optimizer: adamw\."
    ):
        made("adamw8bit", model())


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("lion", "lion_pytorch.foreach", "lion-pytorch"),
        ("prodigy", "prodigyopt", "prodigyopt"),
        ("adamw_schedulefree", "schedulefree", "schedulefree"),
    ],
)
def test_missing_library_is_told_with_the_command_that_installs_it(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"optimizer: {name} needs the package {package}.* Run: pip install {package} "
    ):
        made(name, model())
    monkeypatch.undo()
    assert importlib.import_module(module)


def test_state_of_another_optimizer_is_refused():
    net = model()
    optimizer = made("adamw", net)
    train(net, optimizer, 0, 1)
    with pytest.raises(ResumeError, match="its optimizer state is of AdamW, this run uses Lion"):
        load_optimizer_state(made("lion", model()), *optimizer_state(optimizer))


def test_state_of_other_parameters_is_refused():
    net = model()
    optimizer = made("adamw", net)
    train(net, optimizer, 0, 1)
    fewer = make_optimizer("adamw", [ParameterGroup("unet", [model()[0].weight], 1e-3)])
    with pytest.raises(ResumeError, match="its optimizer state is of another set of layers"):
        load_optimizer_state(fewer, *optimizer_state(optimizer))


@pytest.mark.parametrize(
    ("name", "rate", "schedule", "text"),
    [
        ("prodigy", 2e-4, "cosine", r"learning_rate: 0\.0002 is a factor .* 1\.0 is usual"),
        ("adamw", 1.0, "cosine", r"learning_rate: 1 is high for adamw; 2e-4 is usual \(1\.0 is prodigy's\)"),
        ("lion", 2e-4, "cosine", r"learning_rate: 0\.0002 is high for lion.* 4e-05 for instance"),
        (
            "adamw_schedulefree",
            1e-3,
            "cosine",
            r"lr_scheduler: cosine and adamw_schedulefree both .*constant_with_warmup",
        ),
    ],
)
def test_unusual_rate_or_schedule_gets_one_line_of_advice(name, rate, schedule, text):
    (line,) = optimizer_advice(name, rate, schedule)
    assert re.search(text, line)


@pytest.mark.parametrize(
    ("name", "rate", "schedule"),
    [
        ("adamw", 2e-4, "cosine"),
        ("prodigy", 1.0, "cosine"),
        ("lion", 5e-5, "linear"),
        ("adamw_schedulefree", 1e-3, "constant_with_warmup"),
    ],
)
def test_usual_rate_gets_no_advice(name, rate, schedule):
    assert optimizer_advice(name, rate, schedule) == []
