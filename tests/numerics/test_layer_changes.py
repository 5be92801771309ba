"""The tensors of every kind of adapter against LyCORIS's and PEFT's own reconstruction."""

import logging
import math

import peft
import pytest
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

from lora_scripts.adapters.parts import change_from_parts
from lora_scripts.errors import ModelError

LAYERS = {
    "linear": lambda: nn.Linear(24, 40),
    "conv1x1": lambda: nn.Conv2d(24, 40, 1),
    "conv3x3": lambda: nn.Conv2d(24, 40, 3, padding=1),
}
RANK, ALPHA = 4, 6.0


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def reference(module_class, layer, **options):
    """A LyCORIS module with drawn weights, the parts its file would have, and the change that it makes."""
    module = module_class("x", layer, **({"lora_dim": RANK, "alpha": ALPHA} | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter == 1))
        parts = (
            {name: tensor.detach().clone() for name, tensor in module.custom_state_dict().items()}
            if hasattr(module, "custom_state_dict") and module_class is not DiagOFTModule
            else {name: t.detach().clone() for name, t in module.state_dict().items()}
        )
        x = torch.randn(2, 24, *([5, 5] if isinstance(layer, nn.Conv2d) else []), generator=generator)
        return module, parts, x, module(x)


def assert_same_change(parts, layer, x, expected):
    change = change_from_parts(parts, tuple(layer.weight.shape))
    weight = layer.weight.detach()
    delta = change.delta(weight)
    assert delta.shape == weight.shape
    assert change.shape == tuple(weight.shape)
    with torch.no_grad():
        run = (
            (lambda w: layer._conv_forward(x, w, layer.bias))
            if isinstance(layer, nn.Conv2d)
            else (lambda w: nn.functional.linear(x, w, layer.bias))
        )
        torch.testing.assert_close(run(weight + delta), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(run(weight), expected, atol=1e-2), "the reference changes nothing"
    again = change_from_parts(change.parts(), tuple(weight.shape))
    torch.testing.assert_close(again.delta(weight), delta, rtol=0, atol=0)
    return change


CASES = [
    (LoConModule, {}),
    (LoConModule, {"use_tucker": True}),
    (LoConModule, {"weight_decompose": True}),
    (LohaModule, {}),
    (LohaModule, {"use_tucker": True}),
    (LohaModule, {"weight_decompose": True}),
    (LokrModule, {"factor": 4}),
    (LokrModule, {"factor": 4, "use_tucker": True, "lora_dim": 2}),
    (LokrModule, {"factor": 4, "lora_dim": 1, "decompose_both": True}),
    (LokrModule, {"factor": 4, "full_matrix": True}),
    (LokrModule, {"factor": 2, "lora_dim": 2, "weight_decompose": True}),
    (DiagOFTModule, {}),
    (DiagOFTModule, {"rescaled": True}),
    (DiagOFTModule, {"constraint": 0.05}),
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("module_class", "options"), CASES, ids=lambda case: str(getattr(case, "__name__", case)))
def test_change_read_from_a_lycoris_file_is_lycoris_own(module_class, options, layer):
    torch.manual_seed(0)
    layer = LAYERS[layer]()
    _, parts, x, expected = reference(module_class, layer, **options)
    change = assert_same_change(parts, layer, x, expected.detach())
    assert (
        change.kind == {"LoCon": "lora", "Loha": "loha", "Lokr": "lokr", "DiagOFT": "oft"}[module_class.__name__[:-6]]
    )


def test_whole_difference_is_added_as_it_is():
    diff = torch.randn(40, 24)
    change = change_from_parts({"diff": diff}, (40, 24))
    torch.testing.assert_close(change.delta(), diff, rtol=0, atol=0)
    assert change.parts().keys() == {"diff"}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_change_read_from_a_peft_layer_is_pefts_own(kind, effective, layer):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[layer]())
    config = getattr(peft, f"{kind}Config")(
        r=RANK,
        alpha=ALPHA,
        target_modules=["0"],
        init_weights=False,
        use_effective_conv2d=effective,
        **({"decompose_factor": 4} if kind == "LoKr" else {}),
    )
    wrapped = peft.get_peft_model(model, config).base_model.model[0]
    prefix = "hada_" if kind == "LoHa" else "lokr_"
    parts = {
        name.split(".")[0]: tensor.detach() for name, tensor in wrapped.named_parameters() if name.startswith(prefix)
    }
    change = change_from_parts({**parts, "alpha": torch.tensor(ALPHA)}, tuple(wrapped.base_layer.weight.shape))
    expected = wrapped.get_delta_weight("default").detach()
    if len(change.parts()) == 3 and kind == "LoKr":  # both factors whole: PEFT scales all the same, LyCORIS does not
        expected = expected / (ALPHA / RANK)
    torch.testing.assert_close(change.delta(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_change_of_half_precision_parts_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    _, parts, _, _ = reference(LohaModule, nn.Linear(24, 40))
    rounded = {name: tensor.to(dtype) for name, tensor in parts.items()}
    exact = change_from_parts({name: tensor.float() for name, tensor in rounded.items()})
    assert change_from_parts(rounded).delta().dtype == torch.float32
    torch.testing.assert_close(change_from_parts(rounded).delta(), exact.delta())


def test_lengths_by_input_channel_scale_columns():
    torch.manual_seed(0)
    layer = nn.Linear(24, 40)
    _, parts, x, expected = reference(LoConModule, layer, weight_decompose=True, wd_on_out=False)
    assert parts["dora_scale"].shape == (1, 24)
    assert_same_change(parts, layer, x, expected.detach())


def test_missing_alpha_means_a_scale_of_one():
    down, up = torch.randn(4, 24), torch.randn(40, 4)
    change = change_from_parts({"lora_down.weight": down, "lora_up.weight": up})
    torch.testing.assert_close(change.delta(), up @ down)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"hada_w1_a": (40, 4), "hada_w1_b": (4, 24), "hada_w2_a": (40, 4)}, "hada_w2_b missing"),
        (
            {"hada_w1_a": (40, 4), "hada_w1_b": (4, 24), "hada_w2_a": (40, 3), "hada_w2_b": (4, 24)},
            "do not fit together",
        ),
        ({"lokr_w1": (4, 4), "lokr_w2": (10, 7)}, r"do not fit a weight of \[40, 24\]"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (10, 2)}, "lokr_w2_b missing"),
        ({"oft_blocks": (2, 5, 8, 8)}, "BOFT"),
        ({"oft_R.weight": (5, 28)}, "not read"),
        ({"lora_down.weight": (4, 24), "lora_up.weight": (40, 4), "strange": (1,)}, "strange not known"),
        ({"lora_down.weight": (4, 24), "lora_up.weight": (40, 5)}, "do not fit together"),
        ({"diff": (39, 24)}, r"do not fit a weight of \[40, 24\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ModelError, match=message):
        change_from_parts({name: torch.zeros(shape) for name, shape in parts.items()}, (40, 24))


def test_rank_of_a_loha_file_is_at_most_its_square():
    torch.manual_seed(0)
    _, parts, _, _ = reference(LohaModule, nn.Linear(24, 40), lora_dim=3)
    assert torch.linalg.matrix_rank(change_from_parts(parts).delta()) <= 9
    assert math.isclose(change_from_parts(parts).rank, 3)
