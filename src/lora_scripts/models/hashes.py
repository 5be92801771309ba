"""Names for the content of files: quick ones for our caches, and the ones other programs put in their metadata."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.atomic import write_atomically
from lora_scripts.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_scripts.models.weights_file import WeightsHeader

__all__ = ["file_sha256", "webui_legacy_hash", "weights_fingerprint"]

_WINDOWS = 64
_WINDOW_BYTES = 1 << 16
_TENSOR_WINDOW_BYTES = 1 << 12


def weights_fingerprint(headers: Iterable[WeightsHeader], texts: Iterable[bytes] = ()) -> str:
    """32 hexadecimal digits that change when any tensor does, read in a fraction of a second.

    Hashed are: each file's header (names, shapes, metadata), its size, 4 KB from the middle of every tensor, and 64 windows of
    64 KB at evenly spaced offsets. Training, merging or another dtype changes every window of the tensors concerned; only
    an edit of single numbers by hand could go unseen. Time stamps are left out, so a copied file keeps its fingerprint.

    Args:
        texts: further bytes that belong to the model, such as its configuration files.
    """
    digest = hashlib.sha256()
    for header in headers:
        with header.path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size}\n".encode())
            digest.update(file.read(header.data_start))
            windows = []
            for info in header.tensors.values():
                middle = header.data_start + (info.begin + info.end - _TENSOR_WINDOW_BYTES) // 2
                begin = max(header.data_start + info.begin, middle)
                windows.append((begin, min(_TENSOR_WINDOW_BYTES, info.num_bytes)))
            for index in range(_WINDOWS):
                begin = (size - _WINDOW_BYTES) * index // (_WINDOWS - 1)
                windows.append((max(0, begin), _WINDOW_BYTES))
            for begin, length in sorted(windows):
                file.seek(begin)
                digest.update(file.read(length))
    for text in texts:
        digest.update(f"{len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()[:32]


def webui_legacy_hash(path: Path | str) -> str:
    """8 hexadecimal digits, the short hash of older WebUI versions; kohya files carry it as `ss_sd_model_hash`.

    Source: AUTOMATIC1111/stable-diffusion-webui, `modules/sd_models.py`, and kohya-ss/sd-scripts, `library/train_util.py`: SHA-256
    of 64 KB from offset 1 MB on, cut to 8 digits.
    """
    with Path(path).open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def file_sha256(path: Path | str, *, cache_file: Path | None = None) -> str:
    """64 hexadecimal digits over a whole file; its first 10 are the WebUI's present short hash.

    Several seconds for a full-size model, so results are remembered by path, size and time stamp.

    Args:
        cache_file: where results are remembered, by default `hashes.json` in LORA_SCRIPTS_CACHE or `~/.cache/lora-scripts`.
    """
    path = Path(path).resolve()
    cache_file = cache_file or _cache_folder() / "hashes.json"
    state = path.stat()
    stamp = f"{state.st_size}-{state.st_mtime_ns}"
    known = _read_cache(cache_file)
    entry = known.get(str(path))
    if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str):
        return str(entry["sha256"])
    with Path(path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    known = {**_read_cache(cache_file), str(path): {"stamp": stamp, "sha256": sha256}}
    _write_cache(cache_file, known)
    return sha256


def _cache_folder() -> Path:
    chosen = os.environ.get("LORA_SCRIPTS_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lora-scripts"


def _read_cache(cache_file: Path) -> dict[str, object]:
    try:
        known = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(cache_file: Path, known: dict[str, object]) -> None:
    """Replaces the cache in one step; a cache that cannot be written costs time later and nothing else."""
    with contextlib.suppress(DataError):
        write_atomically(cache_file, json.dumps(known, indent=1))
