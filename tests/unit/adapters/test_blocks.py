"""Values by block: which layers a name means, what wins, what is refused; presets."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lora_scripts.adapters.blocks import block_value, check_blocks, short_name
from lora_scripts.adapters.lora import attach
from lora_scripts.adapters.presets import PRESETS, with_preset
from lora_scripts.errors import ConfigError, TargetError
from lora_scripts.families.latent_diffusion import LatentDiffusion
from lora_scripts.families.sdxl import StableDiffusionXL

DOWN = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UP = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q"
TEXT = "text_encoder.encoder.layers.3.self_attn.q_proj"
LAYERS = [DOWN, MID, UP, TEXT]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"unet.down": 4}, [4, 0, 0, 0]),
        ({"unet": 2, "unet.up": 3, "unet.up.1": 5}, [2, 2, 5, 0]),
        ({"unet.up_blocks.1.attentions.2": 7, "unet.up.1": 5}, [0, 0, 7, 0]),
        ({"text_encoder": 1}, [0, 0, 0, 1]),
        ({"text_encoder.layers.3": 1}, [0, 0, 0, 1]),
        ({"text_encoder.layers": 1, "unet.mid_block": 6}, [0, 6, 0, 1]),
    ],
)
def test_longest_block_that_a_layer_lies_in_wins(values: dict[str, int], expected: list[int]) -> None:
    assert [block_value(layer, values, 0) for layer in LAYERS] == expected


def test_block_ends_at_a_dot() -> None:
    assert block_value("unet.up_blocks.10.conv", {"unet.up.1": 1}, 0) == 0
    assert block_value("text_encoder_2.encoder.layers.0.q_proj", {"text_encoder": 1}, 0) == 0
    assert short_name(TEXT) == "text_encoder.layers.3.self_attn.q_proj"


def test_unknown_block_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        TargetError, match=r"block_ranks: no layer that trains here lies in unet\.upp\. Nearest: unet\.up"
    ):
        check_blocks("block_ranks", ["unet.upp"], LAYERS)
    with pytest.raises(TargetError, match=r"All blocks: .*text_encoder.*unet\.mid"):
        check_blocks("block_ranks", ["unet.down.7"], LAYERS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.mid_block = nn.Linear(8, 8)
        self.up_blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)])


def attached(**settings: Any) -> dict[str, tuple[int, float]]:
    targets = {"unet": ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0"]}
    adapter = attach({"unet": Net()}, targets, **settings)
    return {name.removeprefix("unet."): (layer.rank, layer.scale) for name, layer in adapter.layers.items()}


def test_block_of_another_rank_keeps_the_scale_and_rank_0_is_left_out() -> None:
    found = attached(rank=4, alpha=6.0, block_ranks={"unet.down.0": 0, "unet.mid": 8})
    assert found == {"down_blocks.1": (4, 1.5), "mid_block": (8, 1.5), "up_blocks.0": (4, 1.5)}


def test_rslora_scale_follows_the_rank_of_the_block() -> None:
    found = attached(rank=4, alpha=6.0, use_rslora=True, block_ranks={"unet.mid": 1})
    assert (found["mid_block"], found["down_blocks.0"]) == ((1, 6.0), (4, 3.0))


def test_convolutions_have_their_own_rank_and_scale() -> None:
    assert attached(rank=4, alpha=6.0, kind="locon", conv_rank=2)["up_blocks.0"] == (2, 1.5)
    assert attached(rank=4, alpha=6.0, kind="locon", conv_rank=2, conv_alpha=1.0)["up_blocks.0"] == (2, 0.5)
    assert attached(rank=4, alpha=6.0, conv_rank=2, block_ranks={"unet.up": 8})["up_blocks.0"][0] == 2


def test_leaving_every_layer_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="every layer is left out"):
        attached(rank=4, alpha=4.0, block_ranks={"unet": 0})


def test_rank_of_a_block_above_its_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"16 is more than unet\.mid_block can use"):
        attached(rank=4, alpha=4.0, block_ranks={"unet.mid": 16})


@pytest.mark.parametrize("roles", [LatentDiffusion.block_roles, StableDiffusionXL.block_roles], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_holds_back_one_role_alone(name: str, roles: dict[str, tuple[str, ...]]) -> None:
    layers = [f"{block}.layer" for blocks in roles.values() for block in blocks]
    ranks, rates = with_preset(name, roles, layers, 8, 1e-3, {}, {})
    held = {"style": "content", "character": "look", "concept": "look"}.get(name)
    assert set(ranks) == set(roles[held] if held else ())
    assert all(0 < rank < 8 for rank in ranks.values())
    assert set(rates) <= set(ranks)
    assert all(rate < 1e-3 for rate in rates.values())


def test_users_blocks_win_over_the_preset() -> None:
    layers = [DOWN, MID, UP]
    ranks, rates = with_preset("style", LatentDiffusion.block_roles, layers, 8, 1e-3, {"unet.mid": 6}, {"unet": 2e-3})
    assert ranks == {"unet.mid": 6, "unet.up.1": 2}
    assert rates == {"unet": 2e-3}
