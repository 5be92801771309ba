"""The texts in a LoRA file's header: `ss_*` as kohya-ss/sd-scripts writes them, and modelspec 1.0.1.

The WebUI sorts, filters and describes a LoRA by these; without them an SDXL LoRA is hidden and no card shows what it was
made from. All values are texts. Tag counts and folder names can give away captions: the level `public` leaves them out.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_HEADER_BYTES", "RunFacts", "file_metadata", "fit_metadata", "metadata_bytes", "with_hashes"]

MAX_HEADER_BYTES = 256_000
"""Readers list hundreds of files by their headers; longer ones make the WebUI's tab slow."""

Level = Literal["full", "public"]

_TEXTS_BYTES = 100_000
"""What the texts may take; the three entries for each of 264 layers of Stable Diffusion 1.5 take 120 KB themselves."""

_SECRETS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|xox[a-z]-[\w-]{10,})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?i:(?<=token=)|(?<=api_key=)|(?<=apikey=)|(?<=password=)|(?<=secret=)|(?<=bearer ))[^\s&\"',}]+"
)
_PUBLIC_LEAVES_OUT = ("ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs")


@dataclass(frozen=True)
class RunFacts:
    """What a finished training knows about itself.

    Attributes:
        output_name: name of the file without ending, and in `<lora:NAME:1>`.
        base_model_version: `sd_v1`, `sd_v2`, `sd_v2_v`, `sdxl_base_v1-0`; the WebUI sorts by it.
        modelspec_architecture: `stable-diffusion-v1/lora`, ...
        base_model: title of the base model; of a path only the last part is written.
        base_model_hash: its first 10 digits of SHA-256, or the older 8-digit hash; empty if unknown.
        rank, alpha: of the most layers.
        steps, epochs: done, not planned.
        resolution: (width, height) in pixels.
        buckets: (width, height) to number of pictures.
        dataset_dirs: folder name to (repeats, number of pictures); no paths.
        regularization_dirs: the same of pictures for regularization.
        tag_frequency: folder name to tag to count, tags as the captions have them.
        network_args: further settings of the adapter, as texts.
        objective: further texts of the header on the loss, by their names there.
        base_loras: name of each LoRA that it was trained on top of, to its weight and the SHA-256 of its content.
        started_at, finished_at: seconds since 1970.
        clip_skip: layers left off the text encoder's end, or None for all layers.
        prediction_type: `epsilon` or `v_prediction`.
        thumbnail: a picture as `data:image/...` URL.
    """

    output_name: str
    base_model_version: str
    modelspec_architecture: str
    rank: int
    alpha: float
    base_model: str = ""
    base_model_hash: str = ""
    network_module: str = "networks.lora"
    network_args: Mapping[str, str] = field(default_factory=dict)
    network_dropout: float = 0.0
    steps: int = 0
    max_steps: int = 0
    epochs: int = 0
    num_epochs: int = 0
    learning_rate: float = 0.0
    text_encoder_learning_rate: float | None = None
    optimizer: str = ""
    lr_scheduler: str = ""
    lr_warmup_steps: int = 0
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    max_grad_norm: float = 0.0
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    objective: Mapping[str, str] = field(default_factory=dict)
    zero_terminal_snr: bool = False
    caption_dropout: float = 0.0
    caption_shuffle: bool = False
    flip: bool = False
    seed: int = 0
    resolution: tuple[int, int] = (512, 512)
    base_loras: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    buckets: Mapping[tuple[int, int], int] = field(default_factory=dict)
    num_images: int = 0
    num_regularization_images: int = 0
    dataset_dirs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    regularization_dirs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    trigger_word: str = ""
    description: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0
    clip_skip: int | None = None
    is_v2: bool = False
    prediction_type: str = "epsilon"
    thumbnail: str = ""


def file_metadata(facts: RunFacts, level: Level = "full") -> dict[str, str]:
    """The header texts of a LoRA file; `ss_tag_frequency` loses its rarest tags where the whole would be too long.

    The hashes over the tensors are added by `with_hashes`, when the tensors are known.

    Source: kohya-ss/sd-scripts, `train_network.py`; Stability-AI/ModelSpec 1.0.1.
    """
    width, height = facts.resolution
    texts = {
        "ss_output_name": facts.output_name,
        "ss_base_model_version": facts.base_model_version,
        "ss_v2": str(facts.is_v2),
        "ss_sd_model_name": _last_part(facts.base_model),
        "ss_sd_model_hash": facts.base_model_hash,
        "ss_network_module": facts.network_module,
        "ss_network_dim": str(facts.rank),
        "ss_network_alpha": _number(facts.alpha),
        "ss_network_args": _json(dict(facts.network_args)),
        "ss_network_dropout": _optional(facts.network_dropout or None),
        "ss_resolution": f"({width}, {height})",
        "ss_clip_skip": _optional(facts.clip_skip),
        "ss_num_train_images": str(facts.num_images),
        "ss_num_reg_images": str(facts.num_regularization_images),
        "ss_enable_bucket": str(len(facts.buckets) > 1),
        "ss_bucket_info": _json(_bucket_info(facts.buckets)),
        "ss_dataset_dirs": _json(_directories(facts.dataset_dirs)),
        "ss_reg_dataset_dirs": _json(_directories(facts.regularization_dirs)),
        "ss_tag_frequency": _json({_last_part(name): _sorted_tags(tags) for name, tags in facts.tag_frequency.items()}),
        "ss_training_comment": facts.description,
        "ss_training_started_at": str(facts.started_at),
        "ss_training_finished_at": str(facts.finished_at),
        "ss_seed": str(facts.seed),
        "ss_steps": str(facts.steps),
        "ss_max_train_steps": str(facts.max_steps or facts.steps),
        "ss_epoch": str(facts.epochs),
        "ss_num_epochs": str(facts.num_epochs or facts.epochs),
        "ss_learning_rate": str(facts.learning_rate),
        "ss_unet_lr": str(facts.learning_rate),
        "ss_text_encoder_lr": _optional(facts.text_encoder_learning_rate),
        "ss_optimizer": facts.optimizer,
        "ss_lr_scheduler": facts.lr_scheduler,
        "ss_lr_warmup_steps": str(facts.lr_warmup_steps),
        "ss_total_batch_size": str(facts.batch_size * facts.gradient_accumulation_steps),
        "ss_batch_size_per_device": str(facts.batch_size),
        "ss_gradient_accumulation_steps": str(facts.gradient_accumulation_steps),
        "ss_gradient_checkpointing": str(facts.gradient_checkpointing),
        "ss_mixed_precision": facts.mixed_precision,
        "ss_max_grad_norm": str(facts.max_grad_norm),
        "ss_min_snr_gamma": _optional(facts.min_snr_gamma),
        "ss_noise_offset": _optional(facts.noise_offset or None),
        **facts.objective,
        "ss_zero_terminal_snr": str(facts.zero_terminal_snr),
        "ss_caption_dropout_rate": str(facts.caption_dropout),
        "ss_shuffle_caption": str(facts.caption_shuffle),
        "ss_flip_aug": str(facts.flip),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": facts.modelspec_architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": facts.output_name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(facts.finished_at or facts.started_at)),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(facts.prediction_type, facts.prediction_type),
    }
    extra = {
        "lora_scripts.base_loras": _json(
            [{"name": n, "weight": weight, "sha256": digest} for n, (weight, digest) in facts.base_loras.items()]
        )
        if facts.base_loras
        else "",
        "modelspec.trigger_phrase": facts.trigger_word,
        "modelspec.description": facts.description,
        "modelspec.thumbnail": facts.thumbnail,
        "modelspec.encoder_layer": "" if facts.clip_skip is None else str(facts.clip_skip),
    }
    texts.update({key: value for key, value in extra.items() if value})
    if level == "public":
        texts = {key: value for key, value in texts.items() if key not in _PUBLIC_LEAVES_OUT}
    return fit_metadata({key: _clean(value) for key, value in texts.items()}, _TEXTS_BYTES)


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The header texts with the hashes that readers know the tensors by.

    `sshs_model_hash` is SHA-256 of the file's tensor part; `sshs_legacy_hash` is the older 8 digits over 64 KB from
    1 MB on, taken of a file that has only the `ss_*` texts so that later edits of the header do not change it.

    Source: kohya-ss/sd-scripts, `library/train_util.py`, `precalculate_safetensors_hashes`.
    """
    from safetensors.torch import save

    data = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    tensor_part = memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
    sha256 = hashlib.sha256(tensor_part).hexdigest()
    return {
        **metadata,
        "sshs_model_hash": sha256,
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{sha256}",
    }


def fit_metadata(metadata: Mapping[str, str], max_bytes: int) -> dict[str, str]:
    """The texts in at most `max_bytes` of the header: the rarest tags go first, then the thumbnail.

    Nothing else is ever that long; what readers sort and filter by stays.
    """
    texts = dict(metadata)
    if (
        metadata_bytes(texts) > max_bytes
        and "modelspec.thumbnail" in texts
        and len(texts["modelspec.thumbnail"]) > max_bytes // 2
    ):
        del texts["modelspec.thumbnail"]
    while metadata_bytes(texts) > max_bytes and texts.get("ss_tag_frequency", "{}") != "{}":
        texts["ss_tag_frequency"] = _halve_tags(texts["ss_tag_frequency"])
    if metadata_bytes(texts) > max_bytes:
        texts.pop("modelspec.thumbnail", None)
    return texts


def metadata_bytes(texts: Mapping[str, str]) -> int:
    """How many bytes the texts take in a safetensors header."""
    return len(json.dumps(dict(texts), ensure_ascii=False).encode("utf-8"))


def _halve_tags(text: str) -> str:
    counts: dict[str, dict[str, int]] = json.loads(text)
    kept = {name: dict(list(tags.items())[: len(tags) // 2]) for name, tags in counts.items()}
    return _json({name: tags for name, tags in kept.items() if tags})


def _directories(facts: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {_last_part(name): {"n_repeats": repeats, "img_count": count} for name, (repeats, count) in facts.items()}


def _sorted_tags(tags: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(((tag, int(count)) for tag, count in tags.items()), key=lambda item: (-item[1], item[0])))


def _bucket_info(buckets: Mapping[tuple[int, int], int]) -> dict[str, object]:
    ordered = sorted(buckets.items(), key=lambda item: (-item[1], item[0]))
    return {
        "buckets": {
            str(index): {"resolution": [width, height], "count": count}
            for index, ((width, height), count) in enumerate(ordered)
        }
    }


def _last_part(name: str) -> str:
    """The last part of a path of either kind of system, so that no user's folder names are given away."""
    return PurePosixPath(name.replace("\\", "/").rstrip("/")).name or name


def _clean(text: str) -> str:
    """Encodable as UTF-8 and without anything that looks like a key, a token or a password."""
    return _SECRETS.sub("***", text.encode("utf-8", "replace").decode("utf-8"))


def _optional(value: float | None) -> str:
    return "None" if value is None else _number(value)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
