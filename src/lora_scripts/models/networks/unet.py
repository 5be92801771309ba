"""The U-Net of Stable Diffusion 1, 2 and SDXL.

Source: Ronneberger et al. 2015, arXiv 1505.04597; Rombach et al. 2022, arXiv 2112.10752; SDXL's second condition: Podell et al.
2023, arXiv 2307.01952, section 2.2. Configuration and names as diffusers' UNet2DConditionModel.

Legend for shapes: B batch, C channels, h w latent height and width, E width of the time embedding, M tokens, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scripts.models.networks.convolutions import Downsample2D, ResnetBlock2D, Upsample2D
from lora_scripts.models.networks.network import ModelConfig, Network
from lora_scripts.models.networks.transformer_blocks import Transformer2DModel, run

__all__ = ["Prediction", "UNet2DConditionModel", "sinusoids"]

FREE: Mapping[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "upcast_attention": False,  # of diffusers' attention, which torch's own and ours have no need of
    "addition_embed_type_num_heads": 64,
}
FIXED: Mapping[str, Any] = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "dropout": 0.0,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "dual_cross_attention": False,
    "cross_attention_norm": None,
    "attention_type": "default",
    "num_attention_heads": None,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "class_embeddings_concat": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}
LEVELS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
"""Kind of a level -> whether it has attention."""


class Prediction(NamedTuple):
    """[B,out,h,w] what the U-Net says of noisy latents."""

    sample: Tensor


class UNet2DConditionModel(Network):
    """Noisy latents, noise level and caption to what is predicted."""

    free, fixed = FREE, FIXED

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        plan, widths = self.config, list(self.config.block_out_channels)
        layers, depths, heads, time_width = plan.layers_per_block, _depths(plan), _heads(plan), 4 * widths[0]
        self.conv_in = nn.Conv2d(plan.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_width)
        if plan.addition_embed_type is not None:
            self.add_embedding = TimestepEmbedding(plan.projection_class_embeddings_input_dim, time_width)

        def resnet(channels: int, out_channels: int) -> ResnetBlock2D:
            return ResnetBlock2D(channels, out_channels, time_width, plan.norm_num_groups, plan.norm_eps)

        def attention(level: int) -> Transformer2DModel:
            return Transformer2DModel(
                widths[level],
                heads[level],
                depths[level],
                plan.cross_attention_dim,
                plan.norm_num_groups,
                plan.use_linear_projection,
            )

        # Down: what each layer makes is kept for the layer on the way up that makes the same resolution.
        kept, last = [widths[0]], len(widths) - 1
        self.down_blocks = nn.ModuleList()
        for level, (kind, width) in enumerate(zip(plan.down_block_types, widths, strict=True)):
            inputs = [kept[-1], *[width] * (layers - 1)]
            attentions = [attention(level) for _ in inputs] if LEVELS[kind] else []
            resize = Downsample2D(width, padding=1) if level < last else None
            self.down_blocks.append(DownLevel([resnet(channels, width) for channels in inputs], attentions, resize))
            kept += [width] * (layers + (level < last))
        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for kind, level in zip(plan.up_block_types, reversed(range(len(widths))), strict=True):
            width, resnets = widths[level], []
            for _ in range(layers + 1):
                resnets.append(resnet(channels + kept.pop(), width))
                channels = width
            attentions = [attention(level) for _ in resnets] if LEVELS[kind] else []
            self.up_blocks.append(UpLevel(resnets, attentions, Upsample2D(width) if level else None))
        self.mid_block = MiddleLevel([resnet(widths[-1], widths[-1]) for _ in range(2)], [attention(last)])
        self.conv_norm_out = nn.GroupNorm(plan.norm_num_groups, widths[0], plan.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], plan.out_channels, 3, padding=1)

    @classmethod
    def can_be(cls, config: Mapping[str, Any]) -> bool:
        whole = {**FREE, **config}
        return (
            super().can_be(config)
            and {*whole["down_block_types"], *whole["up_block_types"]} <= LEVELS.keys()
            and len(whole["down_block_types"]) == len(whole["up_block_types"]) == len(whole["block_out_channels"])
            and isinstance(whole["cross_attention_dim"], int)
            and isinstance(whole["layers_per_block"], int)
            and isinstance(whole["norm_num_groups"], int)
            and not _nested(whole["transformer_layers_per_block"])
            and whole["addition_embed_type"] in (None, "text_time")
        )

    def enable_gradient_checkpointing(self) -> None:
        """Lets the backward pass compute the blocks' activations anew instead of keeping them."""
        self._set_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        self._set_checkpointing(False)

    def _set_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Level | Transformer2DModel):
                module.gradient_checkpointing = on

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        timestep_cond: None = None,
        cross_attention_kwargs: None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
    ) -> Prediction:
        """What is predicted; the arguments have the names that pipelines of diffusers give them.

        Args:
            sample: [B,C,h,w], the noisy latents.
            timestep: one for all, or [B].
            encoder_hidden_states: [B,M,D], the caption's embeddings.
            added_cond_kwargs: SDXL's `text_embeds` [B,P] and `time_ids` [B,6].
            timestep_cond, cross_attention_kwargs: nothing, or nothing said; for other models.
            return_dict: either way the first entry and `sample` are the prediction.
        """
        assert timestep_cond is None, "this U-Net is not told of guidance"
        assert not cross_attention_kwargs, "this U-Net's attention has no options"
        time = self._embed(sample, timestep, added_cond_kwargs)
        x: Tensor = self.conv_in(sample)
        kept = [x]
        for block in self.down_blocks:
            x, made = block(x, time, encoder_hidden_states)
            kept += made
        x = self.mid_block(x, time, encoder_hidden_states)
        for block in self.up_blocks:
            x = block(x, kept, time, encoder_hidden_states)
        return Prediction(self.conv_out(F.silu(self.conv_norm_out(x))))

    def _embed(
        self, sample: Tensor, timestep: Tensor | float, added_cond_kwargs: Mapping[str, Tensor] | None
    ) -> Tensor:
        """[B,E] of the noise level, and of what else is not a sequence."""
        given = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
        levels = given.to(sample.device).reshape(-1).expand(len(sample))
        embedded: Tensor = self.time_embedding(self._waves(levels, self.conv_in.out_channels).to(sample.dtype))
        if self.config.addition_embed_type is not None:
            assert added_cond_kwargs is not None, "this U-Net is told of the picture's size and the pooled caption"
            pooled, numbers = added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
            waves = self._waves(numbers.flatten(), self.config.addition_time_embed_dim).reshape(len(pooled), -1)
            embedded = embedded + self.add_embedding(torch.cat([pooled, waves], dim=-1).to(embedded.dtype))
        return embedded

    def _waves(self, numbers: Tensor, width: int) -> Tensor:
        return sinusoids(numbers, width, cosine_first=self.config.flip_sin_to_cos, shift=self.config.freq_shift)


class TimestepEmbedding(nn.Module):
    """Two linear layers, [B,width] to [B,E]."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, each with a transformer behind it where the level has attention."""

    def __init__(self, resnets: Iterable[ResnetBlock2D], attentions: Sequence[Transformer2DModel]) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.num_attentions = len(attentions)

    def layer(self, index: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """[B,C,h,w] after one residual block and its transformer."""
        x = run(self.resnets[index], x, time, again=self.gradient_checkpointing)
        return self.attentions[index](x, context) if self.num_attentions else x


class DownLevel(Level):
    """On the way down: also what each of its layers made."""

    def __init__(
        self,
        resnets: Iterable[ResnetBlock2D],
        attentions: Sequence[Transformer2DModel],
        resize: Downsample2D | None,
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = None if resize is None else nn.ModuleList([resize])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        made = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, context)
            made.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            made.append(x)
        return x, made


class MiddleLevel(Level):
    """A residual block, then transformers with a residual block behind each."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = run(resnet, attention(x, context), time, again=self.gradient_checkpointing)
        return x


class UpLevel(Level):
    """On the way up: each layer reads beside its input what a layer on the way down made."""

    def __init__(
        self, resnets: Iterable[ResnetBlock2D], attentions: Sequence[Transformer2DModel], resize: Upsample2D | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = None if resize is None else nn.ModuleList([resize])

    def forward(self, x: Tensor, kept: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        """Takes as many tensors off the end of `kept` as it has layers; what is left ends in the next resolution."""
        for index in range(len(self.resnets)):
            x = self.layer(index, torch.cat([x, kept.pop()], dim=1), time, context)
        if self.upsamplers is not None:
            size = kept[-1].shape[-2:]
            x = self.upsamplers[0](x, None if size == (2 * x.shape[-2], 2 * x.shape[-1]) else size)
        return x


def sinusoids(numbers: Tensor, width: int, *, cosine_first: bool, shift: float) -> Tensor:
    """[B,width] float32: waves of falling frequency at each number, [B].

    Args:
        shift: taken from the number of frequencies, of which the last is 1/10000 with a shift of 1.
    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=numbers.device) / (half - shift)
    angles = numbers[:, None].float() * torch.exp(exponents)[None]
    waves = torch.sin(angles), torch.cos(angles)
    return F.pad(torch.cat(waves[::-1] if cosine_first else waves, dim=-1), (0, width % 2))


def _depths(config: ModelConfig) -> list[int]:
    """Transformer blocks behind each residual block, by level."""
    return _by_level(config.transformer_layers_per_block, config)


def _heads(config: ModelConfig) -> list[int]:
    """Attention heads by level: what the setting holds despite its name (huggingface/diffusers issue 2011)."""
    return _by_level(config.attention_head_dim, config)


def _by_level(value: Any, config: ModelConfig) -> list[int]:
    return [value] * len(config.block_out_channels) if isinstance(value, int) else list(value)


def _nested(value: Any) -> bool:
    return not isinstance(value, int) and any(not isinstance(item, int) for item in value)
