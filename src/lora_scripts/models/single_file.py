"""Writing Stable Diffusion 1.x, 2.x or SDXL as one `.safetensors` file in the original layout, as WebUI and ComfyUI read it."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ExportError
from lora_scripts.models.components import CONFIG_KEY
from lora_scripts.models.layout_names import Place
from lora_scripts.models.open_clip_layout import unread_open_clip_tensors
from lora_scripts.models.published import published_config
from lora_scripts.models.sd_layout import LAYOUTS, FileLayout, TextPlace
from lora_scripts.models.stable_diffusion import StableDiffusionParts, load_stable_diffusion

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

__all__ = ["builtin_single_file", "original_state_dict", "schedule_tables", "write_single_file"]


def builtin_single_file(folder: Path) -> Path:
    """A built-in model as one file, written on first use: the package need not carry the same weights twice.

    The file lies in the user's cache folder under the weights' fingerprint, so that a newer package writes a new one.
    """
    from lora_scripts.models.source import resolve_base_model

    fingerprint = resolve_base_model(str(folder)).fingerprint
    path = user_cache() / "builtin" / f"{folder.name}-{fingerprint[:12]}" / f"{folder.name}.safetensors"
    if not path.is_file():
        write_single_file(folder, path, title=folder.name)
    return path


def user_cache() -> Path:
    """Where this program may keep what it can make again: XDG_CACHE_HOME, %LOCALAPPDATA% or ~/Library/Caches."""
    named = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(named) if named else default) / "lora-scripts"


def write_single_file(
    model: StableDiffusionParts | Path | str,
    path: Path | str,
    dtype: torch.dtype | None = None,
    *,
    title: str | None = None,
) -> None:
    """Writes the model to `path`, whole or not at all; reading it back gives the same configuration and weights.

    Args:
        model: in memory, or a diffusers folder.
        dtype: of the weights, fp16 by default; the schedule's tables stay fp32.
        title: of the model, for the header; by default the file's name.
    Raises:
        ExportError: the UNet or VAE has a block that the original layout cannot express, or the place cannot be written.
        ModelError: the folder is no whole Stable Diffusion model.
    """
    import torch
    from safetensors.torch import save_file

    from lora_scripts.models.source import resolve_base_model

    path = Path(path)
    if not isinstance(model, StableDiffusionParts):
        model = load_stable_diffusion(resolve_base_model(str(model)), "cpu", torch.float32)
    tensors = original_state_dict(model, dtype or torch.float16)
    tensors |= schedule_tables(model.scheduler_config)
    layout = LAYOUTS[model.family]
    configs = {part: _plain_config(part, getattr(model, part).config, layout) for part in layout.components}
    configs["scheduler"] = _json_values(model.scheduler_config)
    velocity = model.prediction_type == "v_prediction"
    # Marker tensors and header entry: ComfyUI reads the former, the WebUI's forks the latter.
    if velocity:
        tensors["v_pred"] = torch.zeros(0)
    if model.scheduler_config.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = torch.zeros(0)
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": layout.architecture_of(model.prediction_type),
        "modelspec.implementation": layout.implementation,
        "modelspec.title": title or path.stem,
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        CONFIG_KEY: json.dumps(configs, sort_keys=True),
    }
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        # The writer makes files that only their owner can read; the user's own default is what is expected here.
        temporary.chmod(mode)
        os.replace(temporary, path)
    except Exception as error:  # the writer raises its own kind of exception for a full disk
        raise ExportError(
            f"{path}: could not be written ({error}). Check the free space and the folder's permissions."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def original_state_dict(model: StableDiffusionParts, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights by their names in the original layout, on the CPU.

    Raises:
        ExportError: a weight has no place there.
    """

    layout = LAYOUTS[model.family]
    tensors: dict[str, Tensor] = {}
    for part in layout.components:
        state = getattr(model, part).state_dict()
        try:
            places = layout.places(part, state)
        except (ValueError, KeyError) as error:
            raise ExportError(f"the {part} cannot be written as a single file: {error}") from None
        tensors |= _laid_out(part, {name: state[name].to("cpu", dtype) for name in state}, places)
        if part in layout.texts:
            tensors |= _beside_text(layout.texts[part], getattr(model, part).config, tensors)
    return tensors


def _laid_out(part: str, state: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """A component's tensors as the file has them: thirds joined, turned ones turned back."""
    import torch

    tensors: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, place in places.items():
        tensor = state[name].T if place.turned else state[name]
        # Linear in diffusers, a 1x1 convolution in the original.
        if part == "vae" and ".mid.attn_1." in place.name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        if place.third is None:
            tensors[place.name] = tensor.contiguous()
        else:
            thirds.setdefault(place.name, {})[place.third] = tensor
    return tensors | {name: torch.cat([parts[third] for third in range(3)]) for name, parts in thirds.items()}


def _beside_text(text: TextPlace, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What files hold of a text encoder beside the weights that are read."""
    import torch

    if text.penultimate:
        return unread_open_clip_tensors(tensors, text.prefix, config.num_hidden_layers)
    if text.open_clip:
        return {}
    return {text.prefix + "text_model.embeddings.position_ids": torch.arange(config.max_position_embeddings)[None]}


def schedule_tables(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The noise schedule as the original file carries it, [timesteps] each, fp32; loaders take `alphas_cumprod` from it.

    Source: CompVis/stable-diffusion, `ldm/models/diffusion/ddpm.py`, `register_schedule`; computed in fp64 as there.
    """
    import torch

    start, end, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    else:
        raise ExportError(
            f"beta_schedule {config['beta_schedule']!r}: a single file can hold scaled_linear and linear."
        )
    alphas_cumprod = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    tables = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas_cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
    }
    return {name: table.float() for name, table in tables.items()}


def _plain_config(part: str, config: Any, layout: FileLayout) -> dict[str, Any]:
    """What describes the module; the published values stay out, so a full-size file's header is short."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    published = published_config(part, layout.family)
    if part == "unet" and layout.velocity_sample_size is not None:
        del published["sample_size"]  # what it is in a silent file depends on the prediction, so it is always written
    kept = {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and key not in ("architectures", "dtype", "transformers_version")
    }
    return _json_values(
        {key: value for key, value in kept.items() if key not in published or _lists(value) != published[key]}
    )


def _json_values(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _lists(value)
        for key, value in config.items()
        if not key.startswith("_") and isinstance(value, str | int | float | bool | list | tuple | None)
    }


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
