"""From the text of `base_model:` to one checked model on the disk: what it is, of which family, and whether it is whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_scripts.errors import ModelError
from lora_scripts.families import family_class
from lora_scripts.models.file_kinds import looks_like
from lora_scripts.models.hashes import weights_fingerprint
from lora_scripts.models.hub import DIFFUSERS, TRANSFORMERS, Layout, cached_snapshot, download_snapshot, pick_weights
from lora_scripts.models.recognise import (
    Recognised,
    read_json,
    recognise_file,
    recognise_folder,
    shard_names,
    trained_families,
)
from lora_scripts.models.schedule_marks import PredictionType, schedule_of_file
from lora_scripts.models.sd_layout import LAYOUTS
from lora_scripts.models.weights_file import WeightsHeader, inspect_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BaseModel", "PredictionType", "component_weights", "resolve_base_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine, checked as far as its headers go; no tensor has been read.

    Attributes:
        name: as the user wrote it.
        path: the file, or the folder with `model_index.json` or `config.json`.
        family: a key of `lora_scripts.families.FAMILIES`.
        title: short name for metadata and reports.
        fingerprint: 32 hexadecimal digits, another one for other weights or another configuration; with those of the LoRAs
            that are folded into the weights behind a `+`.
        prediction_type: what the denoiser predicts, as far as the model says; "epsilon" where it is silent.
        zero_terminal_snr: whether it was trained on a schedule whose last step is pure noise.
        notes: what people should know who train it, such as what the file leaves open.
    """

    name: str
    kind: Literal["single_file", "diffusers_folder", "transformers_folder"]
    path: Path
    family: str
    title: str
    fingerprint: str
    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool = False
    notes: tuple[str, ...] = ()

    @property
    def own_fingerprint(self) -> str:
        """That of the model as its files have it: for parts that no LoRA changes."""
        return self.fingerprint.partition("+")[0]


def resolve_base_model(name: str, *, allow_download: bool = False, task: str | None = None) -> BaseModel:
    """The model behind `base_model:`: a file, a folder, `builtin:NAME`, or a hub id in the local hub cache.

    `builtin:mini-sd.safetensors` is the built-in model as WebUI users have theirs, in one file of the original layout.

    Args:
        allow_download: fetch a hub id that is not in the cache; otherwise nothing touches the network.
        task: the `task_type` that it shall be trained in; None for any.
    Raises:
        ModelError: nothing is there (nearest names are suggested), or it is not a whole model of a trained family.
    """
    source = _resolve(name.strip(), allow_download, _layout(name.strip(), task))
    if task is not None and (own := family_class(source.family).task) != task:
        raise ModelError(
            f"base_model {name}: this is {_TITLES[own]}, which is trained with task_type: {own}; the config says {task}. "
            "Change one of the two."
        )
    return source


_TITLES = {"text-to-image": "a model that makes pictures", "text-generation": "a language model"}


def _layout(name: str, task: str | None) -> Layout:
    """How a model from the hub is built; where the task does not say so, as the one in the local cache is."""
    if task is not None:
        return TRANSFORMERS if task == "text-generation" else DIFFUSERS
    known = _HUB_ID.fullmatch(name) and cached_snapshot(name, DIFFUSERS) is None
    return TRANSFORMERS if known and cached_snapshot(name, TRANSFORMERS) is not None else DIFFUSERS


def _resolve(name: str, allow_download: bool, layout: Layout) -> BaseModel:
    if name.startswith("builtin:"):
        return _open(_builtin(name), name, title=name.removeprefix("builtin:").removesuffix(".safetensors"))
    path = Path(name)
    try:
        path = path.expanduser()
        exists = path.exists()
    except RuntimeError:
        raise ModelError(f"base_model {name}: no such user's home folder here. Write the whole path.") from None
    except OSError as error:
        raise ModelError(f"base_model {name}: cannot be looked up ({error.strerror}). Check the path.") from None
    if exists:
        return _open(path, name, title=path.stem if path.is_file() else path.resolve().name)
    if _HUB_ID.fullmatch(name) and path.suffix not in (".safetensors", ".ckpt", ".pt", ".bin", ".gguf"):
        snapshot = cached_snapshot(name, layout)
        if allow_download and (snapshot is None or _missing_parts(snapshot, layout)):
            snapshot = download_snapshot(name, lambda folder: _trained(recognise_folder(folder, name), name), layout)
        if snapshot is not None and (missing := _missing_parts(snapshot, layout)):
            raise ModelError(
                f"base_model {name}: it is in the local hub cache, but its {' and '.join(missing)} never arrived. "
                "Set allow_download: true to fetch the rest, or give the path of a whole model."
            )
        if snapshot is not None:
            return _open(snapshot, name, title=name.rpartition("/")[2])
        raise ModelError(
            f"base_model {name}: no such file or folder here, and not in the local hub cache.{_suggest(path)} "
            "If it is a hub id, set allow_download: true to fetch it once, or give the path of a model on this machine."
        )
    raise ModelError(f"base_model {name}: no such file or folder.{_suggest(path)}")


def _builtin(name: str) -> Path:
    """The folder of a built-in model, or the same model as one file where the name ends in `.safetensors`."""
    from lora_scripts.builtin.weights import builtin_path

    if not name.endswith(".safetensors"):
        return builtin_path(name)
    from lora_scripts.models.single_file import builtin_single_file

    return builtin_single_file(builtin_path(name.removesuffix(".safetensors")))


def _missing_parts(snapshot: Path, layout: Layout) -> list[str]:
    """Which parts a download that was broken off left empty; pickles count as there, they are refused later by name."""
    parts = layout.for_model(snapshot, snapshot.name).parts
    parts = tuple(part for part in parts if not any((snapshot / part).glob("*.safetensors")))
    return [part or "weights" for part in parts if not any((snapshot / part).glob("*.bin"))]


def _suggest(path: Path) -> str:
    """What lies nearest to a path that does not exist, with a leading space; empty when nothing is near."""
    existing, missing = path.absolute(), path.name
    while not existing.exists() and existing != existing.parent:
        missing, existing = existing.name, existing.parent
    try:
        entries = sorted(entry.name for entry in existing.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    models = [
        entry for entry in entries if (existing / entry).is_dir() or Path(entry).suffix in (".safetensors", ".ckpt")
    ]
    # Endings are left out of the comparison: all names share them, and X.ckpt for X.safetensors is a likely slip.
    stems = {_stem(entry): entry for entry in models}
    near = [stems[match] for match in get_close_matches(_stem(missing), list(stems), n=3, cutoff=0.6)]
    shown = Path(*path.parts[: len(path.parts) - len(path.absolute().relative_to(existing).parts)])
    if near:
        return f" Did you mean {' or '.join(str(shown / entry) for entry in near)}?"
    files = [entry for entry in models if entry.endswith(".safetensors")]
    return f" In {shown} there are: {', '.join(files[:5])}." if files else ""


def _stem(entry: str) -> str:
    return entry.lower().removesuffix(".safetensors").removesuffix(".ckpt")


def _open(path: Path, name: str, *, title: str) -> BaseModel:
    if path.is_file():
        return _open_file(path, name, title)
    if not path.is_dir():
        raise ModelError(
            f"base_model {name}: neither a file nor a folder. Give a .safetensors file or a diffusers folder."
        )
    return _open_folder(path, name, title)


def _open_file(path: Path, name: str, title: str) -> BaseModel:
    header = inspect_weights(path)
    family = _trained(recognise_file(header), name)
    said = schedule_of_file(header)
    folders = [part.replace("text_encoder", "tokenizer") for part in LAYOUTS[family].texts]
    small = [text for folder in folders for text in _small_files(path.parent / folder)]
    silent = said.prediction_type is None
    return BaseModel(
        name,
        "single_file",
        path,
        family,
        title,
        weights_fingerprint([header], small),
        said.prediction_type or "epsilon",
        said.zero_terminal_snr,
        notes=(LAYOUTS[family].if_silent.format(title=title),) if silent and LAYOUTS[family].if_silent else (),
    )


def _open_folder(folder: Path, name: str, title: str) -> BaseModel:
    if not (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"base_model {name}: {_not_a_model(folder)}")
    family = _trained(recognise_folder(folder, name), name)
    if not (folder / "model_index.json").is_file():
        headers = component_weights(folder, name)
        return BaseModel(
            name, "transformers_folder", folder, family, title, weights_fingerprint(headers, _small_files(folder))
        )
    parts = LAYOUTS[family].components
    headers = [header for part in parts for header in component_weights(folder / part, name)]
    texts = [text for part in sorted(folder.iterdir()) if part.is_dir() for text in _small_files(part)]
    scheduler: Mapping[str, Any] = {}
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json", name)
    return BaseModel(
        name,
        "diffusers_folder",
        folder,
        family,
        title,
        weights_fingerprint(headers, texts),
        _prediction_type(scheduler.get("prediction_type", "epsilon"), name),
        bool(scheduler.get("rescale_betas_zero_snr", False)),
    )


def _small_files(folder: Path) -> list[bytes]:
    """Configurations and vocabularies, which decide about the outputs as much as weights do; empty without the folder."""
    return [file.read_bytes() for file in sorted(folder.glob("*")) if file.suffix in (".json", ".txt", ".jinja")]


def _trained(found: Recognised, name: str) -> str:
    from lora_scripts.families import FAMILIES

    if found.family in FAMILIES:
        return found.family
    way_on = found.way_on or "Choose a base model of that family."
    raise ModelError(f"base_model {name}: this is {found.title}; this version trains {trained_families()}. {way_on}")


def _not_a_model(folder: Path) -> str:
    entries = sorted(folder.iterdir())
    files = [entry.name for entry in entries if entry.suffix == ".safetensors"]
    folders = [entry.name for entry in entries if (entry / "model_index.json").is_file()]
    if files or folders:
        return f"this folder is not itself a model. It holds {', '.join((folders + files)[:5])}: give one of these."
    return "this folder holds no model: neither model_index.json (a diffusers folder) nor a .safetensors file."


def component_weights(folder: Path, name: str) -> list[WeightsHeader]:
    """The weights files of one part of a diffusers folder: the plain one, else the fp16 one, else all shards of an index.

    Args:
        folder: `unet`, `vae` or `text_encoder`.
        name: of the model, for messages.
    Raises:
        ModelError: there are none, only pickles, or a shard is missing.
    """
    if not folder.is_dir():
        raise ModelError(f"base_model {name}: its folder {folder.name} is missing. Copy or download the whole model.")
    picked = pick_weights(file.name for file in folder.iterdir() if file.is_file())
    if picked and picked[0].endswith(".json"):
        return [inspect_weights(folder / shard) for shard in shard_names(folder / picked[0], f"base_model {name}")]
    if picked:
        return [inspect_weights(folder / picked[0])]
    pickles = [file.name for file in sorted(folder.iterdir()) if file.is_file() and looks_like(file) == "pickle"]
    if pickles:
        raise ModelError(
            f"base_model {name}: {folder.name} holds its weights as a pickle only ({pickles[0]}), which can run any program when "
            "it is opened, so it is never loaded. Use a version of the model with .safetensors files."
        )
    raise ModelError(f"base_model {name}: no .safetensors file in {folder}. Copy or download the whole model.")


def _prediction_type(said: object, name: str) -> PredictionType:
    if said == "epsilon":
        return "epsilon"
    if said == "v_prediction":
        return "v_prediction"
    raise ModelError(
        f"base_model {name}: its scheduler says prediction_type {said!r}; epsilon and v_prediction can be trained."
    )
