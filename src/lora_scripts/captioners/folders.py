"""Model folders of captioners: found on this machine, and their files checked before any library reads them.

Nothing here touches the network unless the user asked for a download. What a library would say about a mistyped folder
or a half download is of no help to anyone, so the path and the list of files are looked at first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError, did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = [
    "BLIP_CAPTIONING",
    "BLIP_MATCHING",
    "CLIP",
    "FolderKind",
    "ModelFolder",
    "check_folder",
    "describe",
    "dtype_name",
    "fastest_dtype",
    "find_model",
    "first_available",
    "load_image_processor",
    "load_weights",
    "model_type",
    "quiet_libraries",
]

MODELS_DIR = Path("models")
"""Visible folder in the working directory: `models/blip-image-captioning-base` is found without being named."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOADED = ("*.json", "*.txt", "model*.safetensors")


@dataclass(frozen=True)
class FolderKind:
    """What must lie in a folder.

    Attributes:
        what: for people: "BLIP captioning model".
        model_type: as config.json names it.
        files: each needed file, as alternatives of which one suffices.
        example: a hub id of such a model.
        defaults: hub ids that are used without being named, when they are on this machine; best first.
    """

    what: str
    model_type: str
    files: tuple[tuple[str, ...], ...]
    example: str
    defaults: tuple[str, ...]

    @property
    def file_list(self) -> str:
        """The files that one needs, for people."""
        return ", ".join(names[0] for names in self.files)


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PIXELS = ("preprocessor_config.json", "processor_config.json")

BLIP_CAPTIONING = FolderKind(
    "BLIP captioning model",
    "blip",
    (("config.json",), _WEIGHTS, ("tokenizer.json", "vocab.txt"), _PIXELS),
    "Salesforce/blip-image-captioning-base",
    ("Salesforce/blip-image-captioning-large", "Salesforce/blip-image-captioning-base"),
)
BLIP_MATCHING = FolderKind(
    "BLIP matching model",
    "blip",
    BLIP_CAPTIONING.files,
    "Salesforce/blip-itm-base-coco",
    ("Salesforce/blip-itm-large-coco", "Salesforce/blip-itm-base-coco"),
)
CLIP = FolderKind(
    "CLIP model",
    "clip",
    (("config.json",), _WEIGHTS, ("tokenizer.json", "vocab.json"), _PIXELS),
    "openai/clip-vit-base-patch32",
    ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32"),
)


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine.

    Attributes:
        name: what the user calls it: a path, a hub id, a built-in name.
        where: "built in", "hub cache" or "folder".
    """

    path: Path
    name: str
    where: str

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))


def find_model(name: str, kind: FolderKind, *, download: bool = False) -> ModelFolder:
    """The folder behind a path, a hub id or a built-in name; its files are not yet checked.

    Raises:
        ModelError: it is not on this machine; the text tells the ways to get it.
    """
    from lora_scripts.builtin.weights import builtin_path, is_builtin

    if is_builtin(name):
        return ModelFolder(builtin_path(name), name, "built in")
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelFolder(path, name, "folder")
    if path.is_file():
        raise ModelError(
            f"{name}: is a file. A {kind.what} is a folder with {kind.file_list}; give the folder that holds them."
        )
    if _HUB_ID.fullmatch(name):
        from lora_scripts.models.hub import cached_file

        config = cached_file(name, "config.json")
        if config is not None and any(cached_file(name, weights) for weights in _WEIGHTS):
            return ModelFolder(config.parent, name, "hub cache")
        if download:
            return ModelFolder(_download(name, kind), name, "hub cache")
        half = " Part of it is in the hub cache, but no safetensors weights." if config is not None else ""
        raise ModelError(
            f"{name}: there is no such folder, and no hub model of that name on this machine.{half} Either add --download to "
            f"fetch it, or put its files ({kind.file_list}) into a folder, such as {MODELS_DIR / name.split('/')[1]}, "
            "and give that folder."
        )
    siblings = [item.name for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
    raise ModelError(
        f"{name}: no such folder.{did_you_mean(path.name, siblings)} A {kind.what} is a folder with {kind.file_list}, "
        f"or a hub id such as {kind.example}."
    )


def first_available(kind: FolderKind, variable: str = "") -> tuple[ModelFolder | None, list[str]]:
    """The best model of a kind on this machine that nobody had to name, and remarks about those that cannot be used.

    Looked for in this order: the environment variable, folders under `models/`, the hub cache.

    Raises:
        ModelError: the environment variable names something that cannot be used.
    """
    configured = os.environ.get(variable, "").strip() if variable else ""
    if configured:
        folder = find_model(configured, kind)
        check_folder(folder, kind)
        return folder, []
    from lora_scripts.models.hub import cached_file

    remarks = []
    for hub_id in kind.defaults:
        visible = MODELS_DIR / hub_id.split("/")[1]
        config = cached_file(hub_id, "config.json")
        found = [ModelFolder(visible, str(visible), "folder")] if visible.is_dir() else []
        found += [ModelFolder(config.parent, hub_id, "hub cache")] if config is not None else []
        for folder in found:
            try:
                check_folder(folder, kind)
            except ModelError as error:
                remarks.append(f"Not used: {str(error).splitlines()[0]}")
            else:
                return folder, remarks
    return None, remarks


def model_type(folder: ModelFolder) -> str:
    """What config.json says the model is: "blip", "clip", "llava", ...; empty where it says nothing."""
    try:
        config = json.loads((folder.path / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def check_folder(folder: ModelFolder, kind: FolderKind) -> None:
    """Raises a ModelError that lists what is there and what is missing, or says that the folder holds something else."""
    present = {item.name for item in folder.path.iterdir()}
    missing = [names for names in kind.files if not present.intersection(names)]
    if missing:
        lines = [f"{folder.name}: is no complete {kind.what}; {len(missing)} of {len(kind.files)} files are missing."]
        for names in kind.files:
            there = next((name for name in names if name in present), None)
            lines.append(f"  found    {there}" if there else f"  missing  {' or '.join(names)}")
        pickles = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")))
        if _WEIGHTS in missing and pickles:
            lines.append(
                f"{pickles[0]} is there, but it can run any program when it is opened, so it is never loaded. "
                "Get model.safetensors of the same model."
            )
        lines.append(f"Look at: {folder.path}")
        raise ModelError("\n".join(lines))
    found = model_type(folder)
    if found != kind.model_type:
        raise ModelError(
            f"{folder.name}: is a {found or 'nameless'} model by its config.json, and a {kind.what} is needed, "
            f"such as {kind.example}."
        )
    from lora_scripts.models.weights_file import inspect_weights

    for file in sorted(folder.path.glob("*.safetensors")):
        inspect_weights(file)


def load_weights(model_class: Any, folder: ModelFolder, kind: FolderKind, device: Any, dtype: Any) -> Any:
    """A transformers model from a checked folder, in evaluation mode on the device, on a CPU packed for inference.

    Raises:
        ModelError: the weights do not fill the model; a library would go on with random numbers in the gaps.
    """
    from lora_scripts.models.packed_linear import pack_linears

    try:
        model, report = model_class.from_pretrained(
            folder.path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder.name}: cannot be loaded as a {kind.what}: {reason}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder.name}: is no {kind.what}: {len(missing)} of its weights are missing, such as {missing[0]}. "
            f"Use one like {kind.example}."
        )
    model = model.to(device).eval()
    pack_linears(model)
    return model


def load_image_processor(family: str, folder: ModelFolder) -> Any:
    """The folder's picture preparation, computed with Pillow: "Blip" or "CLIP".

    The class without the ending wants torchvision in newer versions of transformers; in older ones it is the Pillow one.
    """
    import transformers

    found = getattr(transformers, f"{family}ImageProcessorPil", None) or getattr(
        transformers, f"{family}ImageProcessor"
    )
    return found.from_pretrained(folder.path, local_files_only=True)


def fastest_dtype(device: torch.device, folder: ModelFolder) -> torch.dtype:
    """fp16 on a CUDA GPU, bf16 on processors that multiply in it when the model is large enough to gain, else fp32.

    Measured with BLIP base on one core with avx512_bf16: bf16 encodes a picture in 0.79 s, fp32 in 1.35 s. Small models
    lose: converting costs more than multiplying.
    """
    import torch

    from lora_scripts.devices import SMALL_MODEL_BYTES

    if device.type == "cuda":
        return torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cpu" and native and folder.num_bytes > SMALL_MODEL_BYTES:
        return torch.bfloat16
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    import torch

    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def quiet_libraries() -> None:
    """No progress bars and remarks of libraries between our own lines; errors still come as exceptions."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _download(hub_id: str, kind: FolderKind) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_DOWNLOADED)))
    # The hub's library, its transport and the system raise exceptions without a common base, and their texts may hold
    # addresses with signatures in them, so only the kind is told.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"the hub answered {status}" if status else f"{type(error).__name__}"
        raise ModelError(
            f"{hub_id}: could not be downloaded ({why}). Check the name and the network and run the same command again (a "
            f"download goes on where it stopped), or put its files ({kind.file_list}) into a folder and give that."
        ) from None


def describe(folder: ModelFolder, parts: Sequence[str]) -> str:
    """One line about a model in use: name, where it lies, number format and device."""
    return f"{folder.name} ({', '.join([folder.where, *parts])})"
