"""The U-Net's transformers hand on what diffusers' own do, with the channels of a pixel side by side."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from lora_scripts.models.unet_transformer import PixelTransformer, use_pixel_transformers


@pytest.mark.parametrize("linear", [False, True], ids=["1x1 convolutions", "linear projections"])
def test_output_and_gradient_are_diffusers_own_and_stay_side_by_side(linear: bool) -> None:
    torch.manual_seed(0)
    layer = Transformer2DModel(2, 8, 16, norm_num_groups=4, cross_attention_dim=12, use_linear_projection=linear)
    plain = nn.Sequential(layer.requires_grad_(False).to(memory_format=torch.channels_last))
    ours = copy.deepcopy(plain)
    use_pixel_transformers(ours)
    assert isinstance(ours[0], PixelTransformer)
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    captions, grad = torch.randn(2, 7, 12), torch.randn(2, 16, 6, 5)

    def passed(model: nn.Sequential) -> tuple[Tensor, Tensor]:
        given = x.detach().requires_grad_()
        out = model[0](given, encoder_hidden_states=captions, return_dict=False)[0]
        return out, torch.autograd.grad(out, given, grad)[0]

    torch.testing.assert_close(passed(ours), passed(plain))
    rows: list[Tensor] = []
    ours[0].proj_out.register_forward_hook(lambda _, given, out: rows.append(out))
    passed(ours)
    assert linear or rows[0].is_contiguous(memory_format=torch.channels_last)
    assert passed(ours)[0].is_contiguous(memory_format=torch.channels_last)
