"""Which model a weights file or folder holds, told by names and shapes of its tensors and never by its own name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError
from lora_scripts.models.sd_layout import LAYOUTS, FileLayout
from lora_scripts.models.unet_layout import UNET_PREFIX, ema_name
from lora_scripts.models.vae_layout import VAE_PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_scripts.models.weights_file import WeightsHeader

__all__ = ["Recognised", "listed", "read_json", "recognise_file", "recognise_folder", "shard_names", "trained_families"]


@dataclass(frozen=True)
class Recognised:
    """What something is.

    Attributes:
        family: a name that the table of families uses ("sd15") or would use, or "" where it is no base model at all.
        title: for people, with its article: "an SDXL model".
        way_on: what to do about it where it is no base model; may be empty.
    """

    family: str
    title: str
    way_on: str = ""


_SD15 = Recognised("sd15", "a Stable Diffusion 1.x model")
_SD2 = Recognised("sd2", "a Stable Diffusion 2.x model")
_SDXL = Recognised("sdxl", "an SDXL model")
_REFINER = Recognised("sdxl_refiner", "an SDXL refiner, which no LoRA is trained on")
_SD3 = Recognised("sd3", "a Stable Diffusion 3 model")
_FLUX = Recognised("flux", "a Flux model")
_LANGUAGE = Recognised(
    "", "a language model's weights alone", "Give the folder that the file lies in, with config.json and the tokenizer."
)
_LORA = Recognised(
    "", "a LoRA file, not a base model", "To go on from it, set init_lora_weights to it and base_model to its base."
)
_VAE = Recognised("", "a VAE alone", "Give the whole model's file; the VAE is one part of it.")
_TEXT = Recognised("", "a text encoder alone", "Give the whole model's file; the text encoder is one part of it.")
_UNET = Recognised(
    "", "a UNet alone, without VAE and text encoder", "Give the whole model: the full file, or the folder above."
)
_TRANSFORMER = Recognised("", "a diffusion transformer alone (Flux, SD 3, Qwen-Image and others)")
_CONTROLNET = Recognised("", "a ControlNet", "Give the base model that it belongs to.")
_EMBEDDING = Recognised("", "a textual inversion embedding", "Give the base model that it belongs to.")
_UNCLIP = Recognised(
    "", "a Stable unCLIP model, which is given pictures beside captions", "Give a plain Stable Diffusion 2.x model."
)

_LORA_MARKS = (
    ".lora_down.",
    ".lora_up.",
    ".lora_A.",
    ".lora_B.",
    ".hada_w1_a",
    ".lokr_w1",
    ".oft_blocks",
    ".dora_scale",
    ".lora.down.",
)


def trained_families() -> str:
    """The names of the families in the table, for messages."""
    from lora_scripts.families import FAMILIES

    return ", ".join(FAMILIES)


def recognise_file(header: WeightsHeader) -> Recognised:
    """What a single weights file holds.

    Raises:
        ModelError: none of the known kinds; the first names of the file are shown.
    """
    names = header.tensors

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if any(mark in name for name in names for mark in _LORA_MARKS):
        return _LORA
    if any_starts("control_model.", "controlnet_cond_embedding."):
        return _CONTROLNET
    if "emb_params" in names or (
        len(names) <= 4 and any(name in names for name in ("clip_l", "clip_g", "string_to_param"))
    ):
        return _EMBEDDING
    if any_starts(UNET_PREFIX, "model_ema.diffusion_model"):
        return _recognise_whole(header)
    if any_starts("double_blocks.", "transformer.double_blocks."):
        return _FLUX
    if any_starts("joint_blocks.", "transformer.joint_blocks."):
        return _SD3
    if any_starts("transformer_blocks.0."):
        return _TRANSFORMER
    if any_starts("input_blocks.0.", "down_blocks.0.") and any_starts("middle_block.", "mid_block."):
        return _UNET
    if any_starts("encoder.down.0.", "encoder.down_blocks.0.", VAE_PREFIX):
        return _VAE
    if any_starts(
        "text_model.", "encoder.block.0.layer.", "shared.", "cond_stage_model.", "conditioner.", "text_encoders."
    ):
        return _TEXT
    if any_starts("model.embed_tokens.", "model.layers.", "transformer.h.", "lm_head.", "model.language_model."):
        return _LANGUAGE
    some = ", ".join(sorted(names)[:3])
    raise ModelError(
        f"{header.path}: no known kind of model; its {len(names)} tensors are named {some}, ... "
        f"Give a whole checkpoint of a family that this version trains: {trained_families()}."
    )


def _other_inputs(channels: int) -> Recognised:
    kinds = {9: "an inpainting variant", 5: "a depth variant", 7: "an upscaler", 8: "a variant that edits pictures"}
    kind = kinds.get(channels, "a variant with further inputs")
    return Recognised(
        "", f"{kind} (its UNet has {channels} input channels)", "Give the plain version of the model, with 4."
    )


def _recognise_whole(header: WeightsHeader) -> Recognised:
    names = header.tensors

    def starts(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if starts(UNET_PREFIX + "double_blocks."):
        return _FLUX
    if starts(UNET_PREFIX + "joint_blocks."):
        return _SD3
    first = names.get(UNET_PREFIX + "input_blocks.0.0.weight") or names.get(
        ema_name(UNET_PREFIX + "input_blocks.0.0.weight")
    )
    if first is None or len(first.shape) != 4:
        raise ModelError(
            f"{header.path}: a diffusion model of a kind that this version does not know. It trains {trained_families()}."
        )
    if first.shape[1] != 4:
        return _other_inputs(first.shape[1])
    has_label = starts(UNET_PREFIX + "label_emb.") or starts(ema_name(UNET_PREFIX + "label_emb."))
    context = names.get(UNET_PREFIX + "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    width = context.shape[1] if context is not None and len(context.shape) == 2 else None
    if starts("cond_stage_model.model."):
        found = _UNCLIP if has_label else _SD2
    elif has_label or starts("conditioner."):
        # The refiner has OpenCLIP alone, where the base has CLIP before it.
        found = _REFINER if starts("conditioner.embedders.0.model.") or width == _REFINER_WIDTH else _SDXL
    else:
        found = _SD2 if width == _SD2_WIDTH and not starts("cond_stage_model.") else _SD15
    if found.family in LAYOUTS:
        _require_whole(header, LAYOUTS[found.family])
    return found


_REFINER_WIDTH, _SD2_WIDTH = 1280, 1024
"""Numbers per token of a caption that these two read; told by nothing else where the text encoders are missing."""


def _require_whole(header: WeightsHeader, layout: FileLayout) -> None:
    prefixes = {"VAE": VAE_PREFIX}
    for number, text in enumerate(layout.texts.values(), 1):
        prefixes[f"text encoder {number}" if len(layout.texts) > 1 else "text encoder"] = text.prefix
    missing = [what for what, prefix in prefixes.items() if not any(name.startswith(prefix) for name in header.tensors)]
    if missing:
        raise ModelError(
            f"{header.path}: {_ARTICLES.get(layout.family, 'a')} {layout.title} UNet without its {' and '.join(missing)}. "
            f"Use the full version of the model, which holds UNet, VAE and text {'encoders' if len(layout.texts) > 1 else 'encoder'} in one file."
        )


_ARTICLES = {"sdxl": "an"}


_PIPELINES = {"StableDiffusion3Pipeline": _SD3, "FluxPipeline": _FLUX}


def recognise_folder(folder: Path, name: str) -> Recognised:
    """What a folder with a `model_index.json` or a `config.json` holds.

    Raises:
        ModelError: neither file is there, or one cannot be read.
    """
    if (folder / "model_index.json").is_file():
        return _recognise_pipeline(folder, name)
    if (folder / "adapter_config.json").is_file():
        return _LORA
    config = read_json(folder / "config.json", name)
    if "_class_name" in config:
        parts = {"AutoencoderKL": _VAE, "UNet2DConditionModel": _UNET, "ControlNetModel": _CONTROLNET}
        return parts.get(
            config["_class_name"],
            Recognised("", f"one part of a model ({config['_class_name']})", "Give the folder above."),
        )
    kind = str(config.get("model_type", "unknown"))
    if kind.startswith(("clip", "t5", "umt5")):
        return _TEXT
    if any("CausalLM" in str(name) for name in config.get("architectures") or []):
        return Recognised("causal_lm", f"a language model ({kind})")
    return Recognised("", f"a transformers model of type {kind}")


def _recognise_pipeline(folder: Path, name: str) -> Recognised:
    index = read_json(folder / "model_index.json", name)
    pipeline = str(index.get("_class_name"))
    if pipeline in _PIPELINES:
        return _PIPELINES[pipeline]
    if not pipeline.startswith("StableDiffusion") or not (folder / "unet" / "config.json").is_file():
        return Recognised("", f"a diffusers model of the kind {pipeline}")
    unet = read_json(folder / "unet" / "config.json", name)
    channels = unet.get("in_channels", 4)
    if channels != 4:
        return _other_inputs(channels)
    if unet.get("addition_embed_type") or pipeline.startswith("StableDiffusionXL"):
        # The refiner has OpenCLIP alone, and lists the base's first text encoder as one that it lacks.
        lacks_clip = "text_encoder" in index and not listed(index, "text_encoder")
        return _REFINER if lacks_clip or unet.get("cross_attention_dim") == _REFINER_WIDTH else _SDXL
    if unet.get("use_linear_projection") or unet.get("cross_attention_dim") == _SD2_WIDTH:
        return _SD2
    return _SD15


def listed(index: Mapping[str, Any], part: str) -> bool:
    """Whether a `model_index.json` says that the model has a part: some list those that it lacks as [null, null]."""
    entry = index.get(part)
    return isinstance(entry, list) and bool(entry) and entry[-1] is not None


def read_json(path: Path, name: str) -> Mapping[str, Any]:
    """A JSON object from a model folder.

    Args:
        name: of the model, for messages.
    Raises:
        ModelError: it is missing or no JSON object.
    """
    try:
        if path.stat().st_size > 10_000_000:
            raise ModelError(
                f"{name}: {path.name} is larger than any real one. Get the model again from a source you trust."
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{name}: {path} is missing. Copy or download the whole folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: {path} cannot be read ({type(error).__name__}). Download that file again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{name}: {path} is not a JSON object. Download that file again.")
    return config


def shard_names(index: Path, name: str) -> list[str]:
    """The files that the index of a sharded model lists, sorted.

    Raises:
        ModelError: it lists none, or points outside its folder.
    """
    weight_map = read_json(index, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{name}: {index} lists no weights. Download that file again.")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{name}: {index} points outside its folder or at no weights file ({shard!r}).")
    return shards
