"""Stable Diffusion 1.x, 2.x and SDXL in memory: U-Net, VAE, text encoders and tokenizers, from a single file or a folder.

Nothing here touches the network. Modules are built without memory for their weights; each tensor is then read, converted and
put in its place, so that the peak is the model in its final dtype plus one tensor for each thread that reads.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError
from lora_scripts.models.clip_tokenizer import find_tokenizer
from lora_scripts.models.components import build_component, component_configs
from lora_scripts.models.filling import Filling
from lora_scripts.models.frozen_linear import freeze_linears
from lora_scripts.models.frozen_norm import freeze_group_norms
from lora_scripts.models.layout_names import Place
from lora_scripts.models.outline import fill_with_nothing
from lora_scripts.models.published import published_config
from lora_scripts.models.reading_ahead import ReadAhead
from lora_scripts.models.sd_layout import LAYOUTS, FileLayout
from lora_scripts.models.source import BaseModel, PredictionType, component_weights
from lora_scripts.models.unet_layout import UNET_PREFIX, ema_name
from lora_scripts.models.weights_file import WeightsHeader, inspect_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["StableDiffusionParts", "component_files", "load_stable_diffusion", "outline_stable_diffusion"]


@dataclass(frozen=True)
class StableDiffusionParts:
    """A frozen Stable Diffusion in evaluation mode.

    Attributes:
        scheduler_config: of the noise schedule, as diffusers' schedulers take it; prediction type and zero-terminal SNR included.
        text_encoder_2: SDXL's second text encoder (OpenCLIP), with the projection of its pooled output; None for the others.
        tokenizer_2: that encoder's; pads with "!", token 0.
        family: a key of the table of families.
        unread: what is still on the meta device until `read_rest`: part -> how it is read.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    prediction_type: PredictionType
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    family: str = "sd15"
    unread: dict[str, Filling] = field(default_factory=dict)

    def read_rest(self, beginning: str = "") -> None:
        """Reads the weights of what was left for later.

        Args:
            beginning: only of parts whose names begin so.
        Raises:
            ModelError: tensors are not finite, or their file is no longer there.
        """
        for part in [part for part in self.unread if part.startswith(beginning)]:
            self.unread[part].read()
            del self.unread[part]

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
    later: Collection[str] = (),
    images: torch.memory_format | None = None,
) -> StableDiffusionParts:
    """The model's parts on `device`, frozen, in evaluation mode.

    Args:
        dtype: of U-Net and text encoders.
        vae_dtype: of the VAE; by default `dtype`.
        use_ema: take the U-Net's running average where a single file holds it beside the plain weights.
        later: parts of which only names and shapes are checked now; `read_rest` reads their weights.
        images: how the weights of the U-Net's convolutions lie in memory; None for the usual way.
    Raises:
        ModelError: tensors are missing, left over, of the wrong shape or not finite, or no tokenizer fits.
    """
    layout, configs = LAYOUTS[source.family], component_configs(source)
    with ReadAhead(*_plain_unet(source, use_ema), device, dtype, images) as ahead:
        parts = {part: build_component(part, configs[part], source.name) for part in layout.components}
        fillings = {}
        _check_fit(parts, source.name)
        for part, module in parts.items():
            files = component_files(source, part, module, use_ema=use_ema)
            averaged = part == "unet" and any(place.name.startswith("model_ema.") for place in files[0][1].values())
            must_be_read = () if averaged or source.kind != "single_file" else layout.must_be_read(part)
            own_dtype = (vae_dtype or dtype) if part == "vae" else dtype
            fillings[part] = Filling(module, part, files, source.name, device, own_dtype, must_be_read)
        tokenizers = _find_tokenizers(source, parts)
        # Every optimizer of torch imports it when it is made; here, beside the reading, it takes no time of its own.
        import_module("torch._dynamo")
        fillings.pop("unet").read(ahead, images)
    unread = {part: fillings.pop(part) for part in later}
    for filling in fillings.values():
        filling.read()
    for module in parts.values():
        module.requires_grad_(False).eval()
    return _put_together(source, parts, tokenizers, configs["scheduler"], unread)


def _plain_unet(source: BaseModel, use_ema: bool) -> tuple[WeightsHeader, list[str]]:
    """The file with a U-Net's weights, or the first of several, and their names there, as far as known before it is built."""
    if source.kind != "single_file":
        header = component_weights(source.path / "unet", source.name)[0]
        return header, list(header.tensors)
    header = inspect_weights(source.path)
    return header, [name for name in header.tensors if name.startswith(UNET_PREFIX) and not use_ema]


def outline_stable_diffusion(
    source: BaseModel, device: torch.device | str, dtype: torch.dtype, *, vae_dtype: torch.dtype | None = None
) -> StableDiffusionParts:
    """The parts as `load_stable_diffusion` makes them, with whatever numbers memory holds; no weight is read.

    For `FakeTensorMode`, within which it takes no memory.

    Raises:
        ModelError: the configuration describes no such model, or no tokenizer fits.
    """
    configs = component_configs(source)
    parts = {}
    for part in LAYOUTS[source.family].components:
        parts[part] = build_component(part, configs[part], source.name).eval()
        fill_with_nothing(parts[part], device, (vae_dtype or dtype) if part == "vae" else dtype)
    _check_fit(parts, source.name)
    return _put_together(source, parts, _find_tokenizers(source, parts), configs["scheduler"])


def _find_tokenizers(source: BaseModel, parts: Mapping[str, Any]) -> dict[str, Any]:
    folder = source.path.parent if source.kind == "single_file" else source.path
    tokenizers = {}
    for part in LAYOUTS[source.family].texts:
        tokenizer = part.replace("text_encoder", "tokenizer")
        pad_token = published_config(tokenizer, source.family)["pad_token"]
        vocab_size = parts[part].config.vocab_size
        tokenizers[tokenizer] = find_tokenizer(folder / tokenizer, vocab_size, source.name, pad_token)
    return tokenizers


def _put_together(
    source: BaseModel,
    parts: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    scheduler: dict[str, Any],
    unread: dict[str, Filling] | None = None,
) -> StableDiffusionParts:
    freeze_group_norms(parts["unet"])
    for module in parts.values():
        freeze_linears(module)
    schedule = scheduler | {
        "prediction_type": source.prediction_type,
        "rescale_betas_zero_snr": source.zero_terminal_snr,
    }
    return StableDiffusionParts(
        **parts,
        **tokenizers,
        scheduler_config=schedule,
        prediction_type=source.prediction_type,
        family=source.family,
        unread=unread or {},
    )


def component_files(
    source: BaseModel, part: str, module: nn.Module, *, use_ema: bool = False
) -> list[tuple[WeightsHeader, dict[str, Place]]]:
    """For each file that holds weights of a component: name in the module -> where the file has it.

    Args:
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        module: the component; it may be on the meta device.
        use_ema: take the U-Net's running average where a single file holds it beside the plain weights.
    Raises:
        ModelError: a file is missing or damaged, or holds no running average.
    """
    if source.kind == "single_file":
        header = inspect_weights(source.path)
        return [(header, _single_file_places(part, module, header, LAYOUTS[source.family], use_ema))]
    return _folder_places(part, module, component_weights(source.path / part, source.name))


def _single_file_places(
    part: str, module: nn.Module, header: WeightsHeader, layout: FileLayout, use_ema: bool
) -> dict[str, Place]:
    """Name in the module -> where the file has it."""
    plain = layout.places(part, module.state_dict(), header.tensors)
    if part != "unet":
        return plain
    averaged = {name: Place(ema_name(place.name)) for name, place in plain.items()}
    has_plain = any(key.startswith(UNET_PREFIX) for key in header.tensors)
    has_average = all(place.name in header.tensors for place in averaged.values())
    if use_ema and not has_average:
        raise ModelError(f"{header.path}: use_ema: the file holds no running average (EMA). Leave use_ema out.")
    return averaged if use_ema or not has_plain else plain


_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _folder_places(
    part: str, module: nn.Module, headers: Iterable[WeightsHeader]
) -> list[tuple[WeightsHeader, dict[str, Place]]]:
    """For each file: name in the module -> where the file has it, across the spellings of older library versions."""
    wanted = {name.removeprefix("text_model."): name for name in module.state_dict()}
    result = []
    for header in headers:
        places = {}
        for key in header.tensors:
            plain = key.removeprefix("text_model.") if part.startswith("text_encoder") else key
            if part == "vae":
                for old, new in _OLD_ATTENTION.items():
                    plain = plain.replace(old, new)
            if plain.endswith("position_ids"):
                continue
            places[wanted.get(plain, plain)] = Place(key)
        result.append((header, places))
    return result


def _check_fit(parts: Mapping[str, Any], name: str) -> None:
    unet, vae = parts["unet"].config, parts["vae"].config
    texts = [module.config for part, module in parts.items() if part.startswith("text_encoder")]
    width, context = sum(text.hidden_size for text in texts), unet.cross_attention_dim
    if width != context:
        raise ModelError(
            f"{name}: its text encoders are {width} wide and its UNet expects {context}: they belong to different models."
            if len(texts) > 1
            else f"{name}: its text encoder is {width} wide and its UNet expects {context}: they belong to different models."
        )
    if unet.addition_embed_type == "text_time":
        wanted, given = (
            unet.projection_class_embeddings_input_dim,
            texts[-1].projection_dim + 6 * unet.addition_time_embed_dim,
        )
        if wanted != given:
            raise ModelError(
                f"{name}: its UNet expects {wanted} numbers on text and size, its second text encoder makes it {given}: they "
                "belong to different models."
            )
    if vae.latent_channels != unet.in_channels:
        raise ModelError(
            f"{name}: its VAE makes {vae.latent_channels} latent channels and its UNet takes {unet.in_channels}: they belong to different models."
        )
