"""Packed layers compute what the plain ones did, with a GELU where the model has one behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.activations import ACT2FN

from lora_scripts.models.packed_linear import PackedLinear, pack_linears, plain_weight


class FeedForward(nn.Module):
    """As transformers writes it in BLIP and CLIP."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 48), nn.Linear(48, 24, bias=False)
        self.activation_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class Intermediate(nn.Module):
    """As transformers writes it in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(24, 48), ACT2FN["gelu"]

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("make", [lambda: FeedForward("gelu"), lambda: FeedForward("quick_gelu"), Intermediate])
@torch.inference_mode()
def test_output_is_that_of_the_plain_model(make: type[nn.Module], rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = make().to(dtype).eval(), torch.randn(2, rows, 24).to(dtype)
    expected = model(x)
    pack_linears(model)
    # In bfloat16 the GELU gets the product before it is rounded.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 4e-3}
    torch.testing.assert_close(model(x), expected, **close)
    assert not any(isinstance(layer, nn.Linear) for layer in model.modules())


def test_only_an_exact_gelu_is_taken_into_the_product() -> None:
    exact, other = FeedForward("gelu"), FeedForward("quick_gelu")
    pack_linears(exact)
    pack_linears(other)
    assert isinstance(exact.activation_fn, nn.Identity)
    assert not isinstance(other.activation_fn, nn.Identity)


def test_other_devices_and_number_formats_stay_as_they_are() -> None:
    half, elsewhere = nn.Sequential(nn.Linear(8, 8)).half(), nn.Sequential(nn.Linear(8, 8, device="meta"))
    for model in (half, elsewhere):
        pack_linears(model)
        assert type(model[0]) is nn.Linear


def test_plain_weights_are_let_go() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    pack_linears(model)
    assert isinstance(model[0], PackedLinear)
    assert [tuple(p.shape) for p in model.parameters()] == []


@torch.inference_mode()
def test_a_model_of_transformers_still_tells_its_device_and_dtype() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=sizes | {"vocab_size": 30}, vision_config=vision, projection_dim=8)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    expected = model.vision_model(pixels).last_hidden_state
    pack_linears(model)
    torch.testing.assert_close(model.vision_model(pixels).last_hidden_state, expected)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_weight_can_be_had_back(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(40, 24)).to(dtype)
    weight = plain_weight(model[0]).clone()
    pack_linears(model)
    assert torch.equal(plain_weight(model[0]), weight)
