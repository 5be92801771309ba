"""Models from the hub: found in the local cache without a network, fetched only when that was asked for."""

from __future__ import annotations

from pathlib import Path

from lora_scripts.errors import ModelError
from lora_scripts.models.hashes import file_sha256

__all__ = ["cached_file", "cached_snapshot", "download_snapshot"]


def cached_file(repo_id: str, filename: str) -> Path | None:
    """A file of a hub repository in the local cache, or None; never touches the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, filename)
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def cached_snapshot(repo_id: str) -> Path | None:
    """The folder of a diffusers model in the local hub cache, or None; never touches the network."""
    index = cached_file(repo_id, "model_index.json")
    return index.parent if index else None


def download_snapshot(repo_id: str) -> Path:
    """Fetches what training needs of a diffusers model into the hub cache and returns its folder.

    A broken download goes on where it stopped; files that the hub lists with a SHA-256 are compared with it.

    Raises:
        ModelError: no access, no such model, hub overloaded or broken, no network, or a file arrived damaged.
    """
    raise NotImplementedError
