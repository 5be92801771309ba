"""Stable Diffusion 1.x in memory: UNet, VAE, text encoder and tokenizer, from a single file or a diffusers folder.

Nothing here touches the network. Modules are built without memory for their weights; each tensor is then read, converted and
put in its place, so that the peak is the model in its final dtype plus one tensor.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError
from lora_scripts.models.clip_tokenizer import find_tokenizer
from lora_scripts.models.outline import fill_with_nothing
from lora_scripts.models.recognise import read_json
from lora_scripts.models.sd_layout import (
    COMPONENTS,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    derive_config,
    ema_name,
    published_config,
    text_encoder_names,
    unet_names,
    vae_names,
)
from lora_scripts.models.source import BaseModel, PredictionType, component_weights
from lora_scripts.models.weights_file import WeightsHeader, inspect_weights, read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = [
    "CONFIG_KEY",
    "StableDiffusionParts",
    "build_component",
    "load_stable_diffusion",
    "outline_stable_diffusion",
]

CONFIG_KEY = "lora_scripts.config"
"""Header entry of our single files: the parts' configurations as JSON, for what tensor shapes do not show."""


@dataclass(frozen=True)
class StableDiffusionParts:
    """A frozen Stable Diffusion 1.x in evaluation mode.

    Attributes:
        scheduler_config: of the noise schedule, as diffusers' schedulers take it; prediction type and zero-terminal SNR included.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    prediction_type: PredictionType
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """All that read captions."""
        return (self.text_encoder,) if self.text_encoder_2 is None else (self.text_encoder, self.text_encoder_2)

    @property
    def components(self) -> dict[str, nn.Module]:
        """What adapters can be attached to; the projection behind the second text encoder is left out, as in all readers."""
        components: dict[str, nn.Module] = {"unet": self.unet, "text_encoder": self.text_encoder}
        if self.text_encoder_2 is not None:
            components["text_encoder_2"] = self.text_encoder_2.text_model
        return components


def load_stable_diffusion(
    source: BaseModel,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    vae_dtype: torch.dtype | None = None,
    use_ema: bool = False,
) -> StableDiffusionParts:
    """The model's parts on `device`, frozen, in evaluation mode.

    Args:
        dtype: of UNet and text encoder.
        vae_dtype: of the VAE; by default `dtype`.
        use_ema: take the UNet's running average where a single file holds it beside the plain weights.
    Raises:
        ModelError: tensors are missing, left over, of the wrong shape or not finite, or no tokenizer fits.
    """
    dtypes = {"unet": dtype, "vae": vae_dtype or dtype, "text_encoder": dtype}
    configs = _configs(source)
    parts = {part: build_component(part, configs[part], source.name) for part in COMPONENTS}
    for part, module in parts.items():
        if source.kind == "single_file":
            header = inspect_weights(source.path)
            files = [(header, _single_file_names(part, module, header, use_ema))]
        else:
            files = _folder_names(part, module, component_weights(source.path / part, source.name))
        _fill(module, part, files, source.name, device, dtypes[part])
    return _put_together(source, parts, configs["scheduler"])


def outline_stable_diffusion(
    source: BaseModel, device: torch.device | str, dtype: torch.dtype, *, vae_dtype: torch.dtype | None = None
) -> StableDiffusionParts:
    """The parts as `load_stable_diffusion` makes them, with whatever numbers memory holds; no weight is read.

    For `FakeTensorMode`, within which it takes no memory.

    Raises:
        ModelError: the configuration describes no such model, or no tokenizer fits.
    """
    dtypes = {"unet": dtype, "vae": vae_dtype or dtype, "text_encoder": dtype}
    configs = _configs(source)
    parts = {}
    for part in COMPONENTS:
        parts[part] = build_component(part, configs[part], source.name).eval()
        fill_with_nothing(parts[part], device, dtypes[part])
    return _put_together(source, parts, configs["scheduler"])


def _configs(source: BaseModel) -> dict[str, dict[str, Any]]:
    """Configuration of each part and of the scheduler."""
    if source.kind == "single_file":
        return _single_file_configs(inspect_weights(source.path), source.name)
    configs = {part: dict(read_json(source.path / part / "config.json", source.name)) for part in COMPONENTS}
    file = source.path / "scheduler" / "scheduler_config.json"
    configs["scheduler"] = dict(read_json(file, source.name)) if file.is_file() else published_config("scheduler")
    return configs


def _put_together(source: BaseModel, parts: Mapping[str, Any], scheduler: dict[str, Any]) -> StableDiffusionParts:
    folder = source.path.parent if source.kind == "single_file" else source.path
    unet, vae, text_encoder = (parts[part] for part in COMPONENTS)
    _check_fit(unet, vae, text_encoder, source.name)
    tokenizer = find_tokenizer(folder / "tokenizer", text_encoder.config.vocab_size, source.name)
    scheduler = scheduler | {
        "prediction_type": source.prediction_type,
        "rescale_betas_zero_snr": source.zero_terminal_snr,
    }
    return StableDiffusionParts(unet, vae, text_encoder, tokenizer, scheduler, source.prediction_type)


def build_component(part: str, config: Mapping[str, Any], name: str) -> Any:
    """A UNet2DConditionModel, AutoencoderKL or CLIPTextModel on the meta device: all shapes, no memory.

    Raises:
        ModelError: the configuration describes no such module.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        with torch.device("meta"):
            if part == "unet":
                return UNet2DConditionModel.from_config(dict(config))
            if part == "vae":
                return AutoencoderKL.from_config(dict(config))
            return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
    except Exception as error:  # the libraries check their settings with whatever exception is at hand
        raise ModelError(
            f"{name}: the configuration of its {part} is not valid: {str(error).splitlines()[0]}"
        ) from None


def _single_file_configs(header: WeightsHeader, name: str) -> dict[str, dict[str, Any]]:
    """Configuration of each part and of the scheduler: published, then what the shapes say, then what the header says."""
    written: dict[str, dict[str, Any]] = {part: {} for part in (*COMPONENTS, "scheduler")}
    if CONFIG_KEY in header.metadata:
        try:
            for part, config in json.loads(header.metadata[CONFIG_KEY]).items():
                written[part].update(config)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise ModelError(f"{name}: the header entry {CONFIG_KEY} is damaged. Write the file anew.") from None
    shapes = {key: info.shape for key, info in header.tensors.items()}
    configs = {"scheduler": {**published_config("scheduler"), **written["scheduler"]}}
    for part in COMPONENTS:
        if part == "unet" and not any(key.startswith(UNET_PREFIX) for key in shapes):
            # Only the running average is there, under names without dots: which block a shape belongs to cannot be told.
            configs[part] = {**published_config(part), **written[part]}
        else:
            configs[part] = derive_config(part, shapes, written[part])
    return configs


def _single_file_names(part: str, module: nn.Module, header: WeightsHeader, use_ema: bool) -> dict[str, str]:
    """Name in the module -> name in the file."""
    names = module.state_dict().keys()
    if part == "text_encoder":
        with_text_model = any(key.startswith(TEXT_PREFIX + "text_model.") for key in header.tensors)
        return text_encoder_names(names, with_text_model=with_text_model)
    if part == "vae":
        return vae_names(names)
    plain = unet_names(names)
    averaged = {name: ema_name(original) for name, original in plain.items()}
    has_plain = any(key.startswith(UNET_PREFIX) for key in header.tensors)
    has_average = all(key in header.tensors for key in averaged.values())
    if use_ema and not has_average:
        raise ModelError(f"{header.path}: use_ema: the file holds no running average (EMA). Leave use_ema out.")
    return averaged if use_ema or not has_plain else plain


_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _folder_names(
    part: str, module: nn.Module, headers: Iterable[WeightsHeader]
) -> list[tuple[WeightsHeader, dict[str, str]]]:
    """For each file: name in the module -> name in the file, across the spellings of older library versions."""
    wanted = {name.removeprefix("text_model."): name for name in module.state_dict()}
    result = []
    for header in headers:
        names = {}
        for key in header.tensors:
            plain = key.removeprefix("text_model.") if part == "text_encoder" else key
            if part == "vae":
                for old, new in _OLD_ATTENTION.items():
                    plain = plain.replace(old, new)
            if plain.endswith("position_ids"):
                continue
            names[wanted.get(plain, plain)] = key
        result.append((header, names))
    return result


_LAYERS = {
    "unet": re.compile(re.escape(UNET_PREFIX)),
    "vae": re.compile(re.escape(VAE_PREFIX) + r"(encoder|decoder|quant_conv|post_quant_conv)\."),
    "text_encoder": re.compile(re.escape(TEXT_PREFIX) + r"(text_model\.)?encoder\.layers\."),
}
"""Names in a single file that must all find a place. Around them real files carry what no loader reads: position numbers,
losses of the VAE's training, a projection, schedule tables."""


def _fill(
    module: Any,
    part: str,
    files: Iterable[tuple[WeightsHeader, Mapping[str, str]]],
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Reads a module's tensors into it, every name matched both ways, then freezes it.

    Raises:
        ModelError: names the first tensor that is missing, left over or of another shape.
    """
    files = list(files)
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {
        key: header.tensors[stored]
        for header, names in files
        for key, stored in names.items()
        if stored in header.tensors
    }
    missing = [key for key in expected if key not in found]
    left_over = [key for key in found if key not in expected]
    for header, names in files:
        used = set(names.values())
        if not any(key.startswith("model_ema.") for key in used):
            left_over += [key for key in header.tensors if _LAYERS[part].match(key) and key not in used]
    if missing or left_over:
        what = (
            f"{len(missing)} tensors are missing, first {missing[0]}"
            if missing
            else f"{len(left_over)} tensors fit nowhere, first {left_over[0]}"
        )
        raise ModelError(
            f"{name}: the {part} does not match its configuration: {what}. The file is incomplete or of another model: use the original download."
        )
    for key, info in found.items():
        if _without_ones(info.shape) != _without_ones(expected[key]):
            raise ModelError(
                f"{name}: the {part}'s {key} has shape {list(info.shape)}, expected {list(expected[key])}. The configuration belongs to another model."
            )
    state = {}
    for header, names in files:
        back = {stored: key for key, stored in names.items()}
        shapes = {stored: expected[key] for stored, key in back.items()}
        for stored, tensor in read_tensors(header, back, dtype=dtype, device=device, shapes=shapes):
            state[back[stored]] = tensor
    module.load_state_dict(state, strict=True, assign=True)
    _fill_buffers(module, device)
    module.requires_grad_(False)
    module.eval()


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution's shape as that of the linear layer which computes the same."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _fill_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Gives memory to what is not in any file: CLIP's position numbers 0, 1, 2, ..."""
    import torch

    for owner in module.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                assert key == "position_ids", f"a buffer that nothing fills: {key}"
                owner.register_buffer(
                    key, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape), persistent=False
                )
    assert not any(tensor.is_meta for tensor in module.state_dict().values())


def _check_fit(unet: Any, vae: Any, text_encoder: Any, name: str) -> None:
    width, context = text_encoder.config.hidden_size, unet.config.cross_attention_dim
    if width != context:
        raise ModelError(
            f"{name}: its text encoder is {width} wide and its UNet expects {context}: they belong to different models."
        )
    channels, expected = vae.config.latent_channels, unet.config.in_channels
    if channels != expected:
        raise ModelError(
            f"{name}: its VAE makes {channels} latent channels and its UNet takes {expected}: they belong to different models."
        )
