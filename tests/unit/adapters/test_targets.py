import pytest
from torch import nn

from lora_scripts.adapters.targets import adaptable_layers, match_layers, short_names, split_targets
from lora_scripts.errors import TargetError


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.add_to_q = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 16)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([Gate(), nn.Dropout(0.0), nn.Linear(16, 8)])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention()
        self.ff = FeedForward()
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.transformer_blocks = nn.ModuleList([Block(), Block()])


def test_name_matches_at_a_dot_only():
    found = match_layers("unet", Model(), ["to_q"])
    assert list(found) == ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q"]


def test_names_with_numbers_whole_paths_and_component_prefix_match():
    found = match_layers("unet", Model(), ["ff.net.0.proj", "unet.conv_in", "transformer_blocks.1.attn1.to_out.0"])
    assert list(found) == [
        "conv_in",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.1.attn1.to_out.0",
        "transformer_blocks.1.ff.net.0.proj",
    ]


def test_norms_and_grouped_convolutions_are_not_adaptable():
    layers = adaptable_layers(Model())
    assert "conv_in" in layers
    assert not [name for name in layers if "norm" in name or "depthwise" in name]


def test_unmatched_names_are_told_with_the_nearest():
    with pytest.raises(
        TargetError,
        match=r"^target_modules: 2 of 3 names match no layer of unet: ff\.0, ff\.2\. "
        r"Nearest: ff\.net\.[02].*ff\.net\.[02].*\. See all: attn1\.add_to_q, attn1\.to_out\.0, .*conv_in",
    ):
        match_layers("unet", Model(), ["to_q", "ff.0", "ff.2"])


def test_single_unmatched_name_reads_well():
    with pytest.raises(TargetError, match=r"^target_modules: the name matches no layer of unet: to_k\. Nearest: "):
        match_layers("unet", Model(), ["to_k"])


def test_empty_list_of_names_is_an_error():
    with pytest.raises(TargetError, match="list of layer names for unet is empty"):
        match_layers("unet", Model(), [])


def test_short_names_leave_the_block_number_out():
    assert short_names(["down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", "conv_in"]) == [
        "attn1.to_out.0",
        "conv_in",
    ]


def test_split_targets_gives_each_name_to_the_components_that_have_it():
    components = {"unet": Model(), "text_encoder": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})}
    assert split_targets(components, ["to_q", "q_proj"]) == {"unet": ["to_q"], "text_encoder": ["q_proj"]}


def test_split_targets_refuses_a_name_that_no_component_has():
    components = {"unet": Model(), "text_encoder": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})}
    with pytest.raises(
        TargetError, match=r"1 of 2 names matches no layer of unet or text_encoder: k_proj\. Nearest: .*q_proj"
    ):
        split_targets(components, ["to_q", "k_proj"])
