"""Folders `checkpoint-N`: written whole or not at all, verified before use, holding JSON and safetensors only.

    checkpoint-100/
      adapter.safetensors      the trainable weights in float32
      optimizer.safetensors    moments and counters, and the weights' moving average
      state.json               step, the optimizer's plain numbers, and what the run is (settings, data, base model)
      NAME-100.safetensors     the LoRA of this step, as other programs load it
      manifest.json            size and sha256 of every file above; written last

A folder is filled under another name and renamed when every byte is on the disk, so `checkpoint-N` is never half there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import LoraScriptsError, ResumeError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Checkpoint",
    "differences",
    "list_checkpoints",
    "load_checkpoint",
    "newest_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
    "saved_steps",
]

FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = ".partial"
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
"""What `lora_scripts.atomic` names a file until it is whole."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` optimizer steps.

    Attributes:
        adapter: trainable weights by name, float32.
        optimizer_tensors, optimizer_state: as `training.optimizers.optimizer_state` gives them.
        identity: what must be equal for an exact resume: settings, data digest, base model's fingerprint.
        loop: small numbers of the loop, such as the smoothed loss.
    """

    step: int
    adapter: Mapping[str, Tensor]
    optimizer_tensors: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Any]
    identity: Mapping[str, Any]
    loop: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    output_dir: Path, checkpoint: Checkpoint, write_extra: Callable[[Path], None] = lambda folder: None
) -> Path:
    """The finished folder; `write_extra` adds files of its own to it before it is sealed.

    Raises:
        TrainingError: a number is not finite, the disk is full or the folder cannot be written; older checkpoints are
            untouched.
    """
    _require_finite(checkpoint)
    final = output_dir / f"checkpoint-{checkpoint.step}"
    partial = output_dir / (final.name + PARTIAL)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        for name, data in _contents(checkpoint).items():
            _write(partial / name, data)
        write_extra(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in files
        }
        _write(partial / "manifest.json", json.dumps({"format": FORMAT, "files": manifest}, indent=1).encode())
        _sync_folder(partial)
        if final.exists():  # a damaged one of the same step: kept for whoever wants to look, under another name
            aside = final.with_name(final.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(final, aside)
        os.rename(partial, final)
        _sync_folder(output_dir)
    except (OSError, LoraScriptsError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = _system_error(error)
        if cause is None:  # numbers that are not finite, say: its own message is the right one
            raise
        raise TrainingError(_reason(final, checkpoint, cause)) from error
    return final


def _contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """File name -> bytes, but for the manifest and what a caller adds."""
    from safetensors.torch import save

    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "optimizer": checkpoint.optimizer_state,
        "identity": checkpoint.identity,
        "loop": checkpoint.loop,
    }
    return {
        "adapter.safetensors": save({k: v.contiguous() for k, v in checkpoint.adapter.items()}),
        "optimizer.safetensors": save({k: v.contiguous() for k, v in checkpoint.optimizer_tensors.items()}),
        "state.json": json.dumps(state, indent=1, ensure_ascii=False).encode(),
    }


def _system_error(error: BaseException) -> OSError | None:
    """What the system said, where one of our own messages was made from it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause


def _reason(final: Path, checkpoint: Checkpoint, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG):
        return (
            f"{final}: the checkpoint could not be written ({error.strerror or error}). Older checkpoints are untouched. "
            "Check that the folder is there and may be written, then run the same command again to go on."
        )
    # The loadable file of the step holds the adapter once more, at most in float32.
    adapter = sum(t.numel() * t.element_size() for t in checkpoint.adapter.values())
    num_bytes = sum(len(data) for data in _contents(checkpoint).values()) + adapter
    return (
        f"{final}: no room left on the disk: a checkpoint needs {max(num_bytes / 1e6, 0.1):.1f} MB at {final.parent}. "
        "Older checkpoints are untouched. Make room and run the same command again to go on."
    )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders, lowest step first, verified or not; links are not followed."""
    found = []
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            match = NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def saved_steps(output_dir: Path) -> set[int]:
    """The steps of the checkpoints there, whole or not."""
    return {int(folder.name.removeprefix("checkpoint-")) for folder in list_checkpoints(output_dir)}


def newest_checkpoint(output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose every file is as its manifest says, and a line for each newer one that is not.

    What a run that was cut off has left half written is removed.
    """
    notes: list[str] = []
    _sweep(output_dir)
    for folder in reversed(list_checkpoints(output_dir)):
        fault = _fault(folder)
        if fault is None:
            try:
                return _load(folder), notes
            except (OSError, ValueError, KeyError, TypeError) as error:
                fault = f"cannot be read ({error})"
        notes.append(f"{folder.name}: {fault}; the one before it is used.")
    if notes:
        notes[-1] = notes[-1].replace("the one before it is used", "there is none before it, so the run starts anew")
    return None, notes


def _require_finite(checkpoint: Checkpoint) -> None:
    """Weights and moments that are not numbers would make every later checkpoint worthless too."""
    import torch

    for name, tensor in {**checkpoint.adapter, **checkpoint.optimizer_tensors}.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"checkpoint-{checkpoint.step} was not written: {name} holds numbers that are not finite. Older checkpoints "
                "are untouched. Start from one of them with init_lora_weights and a lower learning_rate."
            )


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None when a file of it is not as its manifest says."""
    try:
        return _load(folder) if _fault(folder) is None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prune_checkpoints(output_dir: Path, keep: int, protect: int | None = None) -> list[Path]:
    """Removes all but the newest `keep` checkpoints, never the newest that verifies nor step `protect`; the removed folders.

    A folder that cannot be removed costs room, not the run.
    """
    folders = list_checkpoints(output_dir)
    verified = next((folder for folder in reversed(folders) if _fault(folder) is None), None)
    removed = []
    for folder in folders[:-keep]:
        if folder == verified or folder.name == f"checkpoint-{protect}":
            continue
        # Renamed first: a removal that is cut off must not leave a folder that looks complete.
        doomed = folder.with_name(folder.name + PARTIAL)
        with contextlib.suppress(OSError):
            os.rename(folder, doomed)
            removed.append(folder)
            shutil.rmtree(doomed)
    return removed


def _sweep(output_dir: Path) -> None:
    """Removes what was being written when a run was cut off; only the run that holds the folder may call this."""
    if not output_dir.is_dir():
        return
    for path in output_dir.iterdir():
        if path.name.endswith(PARTIAL) and NAME.fullmatch(path.name.removesuffix(PARTIAL)):
            shutil.rmtree(path, ignore_errors=True)
        elif _TEMPORARY.fullmatch(path.name) and not path.is_dir():
            with contextlib.suppress(OSError):
                path.unlink()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each thing that is not as it was when the checkpoint was written."""
    lines = []
    for key in sorted({*saved, *now}):
        before, after = saved.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after)
        elif before != after:
            lines.append(f"  {key}: was {_show(before)}, is now {_show(after)}")
    return lines


def refuse_differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], output_dir: Path, newest_lora: Path | None
) -> None:
    """Raises ResumeError, with the differences and both ways on, unless the run is the one that was saved."""
    lines = differences(saved, now)
    if not lines:
        return
    older = newest_lora or output_dir / "checkpoint-N" / "NAME-N.safetensors"
    raise ResumeError(
        "\n".join(
            [
                f"{output_dir}: holds a run with other settings or data, which cannot be resumed exactly:",
                *lines,
                "Two ways on:",
                "  start anew:  choose another output_dir",
                f"  build on it: another output_dir, and init_lora_weights: {older.as_posix()}",
            ]
        )
    )


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 70 else text[:67] + "..."


def _load(folder: Path) -> Checkpoint:
    from safetensors.torch import load_file

    state = json.loads((folder / "state.json").read_text("utf-8"))
    if state["format"] != FORMAT:
        raise ValueError(f"written in format {state['format']}, this version reads {FORMAT}")
    return Checkpoint(
        step=state["step"],
        adapter=load_file(folder / "adapter.safetensors"),
        optimizer_tensors=load_file(folder / "optimizer.safetensors"),
        optimizer_state=state["optimizer"],
        identity=state["identity"],
        loop=state["loop"],
    )


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if _sha256(path) != facts["sha256"]:
                return f"{name} was changed or damaged after it was written (its sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
