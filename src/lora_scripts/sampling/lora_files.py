"""LoRA files by the names they go by in `<lora:NAME:0.7>`."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from lora_scripts.errors import ConfigError

__all__ = ["checkpoint_files", "find_loras", "resolve_lora", "step_of"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE = ("adapter", "optimizer")
_UNFINISHED = (".partial", ".damaged")
_STEP = re.compile(r"-(?:step)?(\d+)$")


def find_loras(folders: Sequence[Path]) -> dict[str, Path]:
    """Name to file for everything in the folders: finished LoRAs, and of each checkpoint the LoRA of that step.

    A name that occurs twice is the file nearest to the top, of the folder given first.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for path in _in_folder(folder):
            found.setdefault(path.stem, path)
    return found


def _in_folder(folder: Path) -> list[Path]:
    """Finished files first, then checkpoints by step, then PEFT folders."""
    match = _CHECKPOINT.fullmatch(folder.name)
    if match:
        # The state for resuming lies there as well; only the LoRA carries the step in its name.
        return sorted(folder.glob(f"*-{match[1]}.safetensors"))
    files = [] if folder.suffix in _UNFINISHED else sorted(folder.glob("*.safetensors"))
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: (step_of(path) or 0, path.name)):
        if _CHECKPOINT.fullmatch(checkpoint.name):
            files += _in_folder(checkpoint)
    return files + sorted(path.parent for path in folder.glob("*/adapter_config.json"))


def step_of(path: Path) -> int | None:
    """The step in a file's or checkpoint folder's name, None for a finished file."""
    match = _STEP.search(path.stem if path.suffix == ".safetensors" else path.name)
    return int(match[1]) if match else None


def resolve_lora(name: str, known: Mapping[str, Path], folders: Sequence[Path]) -> Path:
    """The file behind a name, or behind a path written in its place.

    Raises:
        ConfigError: no such LoRA; names the nearest ones and where was looked.
    """
    if name in known:
        return known[name]
    direct = Path(name)
    if direct.is_file() or (direct.suffix == "" and direct.with_name(direct.name + ".safetensors").is_file()):
        return direct if direct.is_file() else direct.with_name(direct.name + ".safetensors")
    lower = {key.lower(): key for key in known}
    near = [lower[match] for match in get_close_matches(name.lower(), list(lower), n=3, cutoff=0.4)]
    looked = ", ".join(str(folder) for folder in folders) or "./output (there is no run in it)"
    if near:
        hint = f"Did you mean {' or '.join(near)}?"
    elif known:
        shown = sorted(known)[:5]
        hint = f"There are: {', '.join(shown)}{', ...' if len(known) > len(shown) else ''}."
    else:
        hint = "No LoRA lies there. Name another folder with --lora-dir."
    raise ConfigError(f"<lora:{name}>: no such LoRA in {looked}. {hint}")


def checkpoint_files(pattern: str) -> list[Path]:
    """The LoRA files behind `--checkpoints`: a run's output folder, one file, or a pattern; by step, the finished last.

    Raises:
        ConfigError: there is none.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = _in_folder(path)
    elif path.is_file():
        files = [path]
    else:
        files = []
        for match in sorted(Path(match) for match in glob.glob(str(path), recursive=True)):
            if match.is_dir():
                files += _in_folder(match)
            elif match.suffix == ".safetensors" and match.parent.suffix not in _UNFINISHED and match.stem not in _STATE:
                files.append(match)
    if not files:
        raise ConfigError(
            f"--checkpoints {pattern}: no LoRA file there. Name the output_dir of a run, or a pattern such as "
            '"output/my_style/checkpoint-*/*.safetensors".'
        )
    unique = list(dict.fromkeys(files))
    return sorted(unique, key=lambda file: (step_of(file) is None, step_of(file) or 0, file.name))
