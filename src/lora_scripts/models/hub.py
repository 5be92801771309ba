"""Models from the hub: found in the local cache without a network, fetched only when that was asked for."""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError
from lora_scripts.models.hashes import file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["DIFFUSERS", "TRANSFORMERS", "Layout", "cached_file", "cached_snapshot", "download_snapshot", "pick_weights"]


@dataclass(frozen=True)
class Layout:
    """How a model's folder is built.

    Attributes:
        title: whose layout it is.
        marker: the file that tells it.
        parts: folders with weights; "" for the model's own folder.
        small: folders whose small files are needed.
        more: parts with weights, and folders of small files, that are needed where the marker lists them.
    """

    title: str
    marker: str
    parts: tuple[str, ...]
    small: tuple[str, ...]
    endings: tuple[str, ...] = (".json", ".txt")
    more: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def for_model(self, folder: Path, name: str) -> Layout:
        """The same layout with the further parts that this model's marker file lists.

        Args:
            folder: of the model; its marker file is there.
            name: of the model, for messages.
        Raises:
            ModelError: the marker file cannot be read.
        """
        if not any(self.more):
            return self
        from lora_scripts.models.recognise import listed, read_json

        index = read_json(folder / self.marker, name)
        parts, small = (tuple(part for part in kind if listed(index, part)) for kind in self.more)
        return replace(self, parts=self.parts + parts, small=self.small + parts + small)


DIFFUSERS = Layout(
    "diffusers",
    "model_index.json",
    ("unet", "vae", "text_encoder"),
    ("unet", "vae", "text_encoder", "scheduler", "tokenizer"),
    more=(("text_encoder_2",), ("tokenizer_2",)),
)
TRANSFORMERS = Layout("transformers", "config.json", ("",), ("",), (".json", ".txt", ".model", ".jinja"))


def cached_file(repo_id: str, filename: str) -> Path | None:
    """A file of a hub repository in the local cache, or None; never touches the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, filename)
    except HFValidationError:  # a path with the shape of a hub id, such as models/a..b
        return None
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def cached_snapshot(repo_id: str, layout: Layout = DIFFUSERS) -> Path | None:
    """The folder of a model in the local hub cache, or None; never touches the network."""
    index = cached_file(repo_id, layout.marker)
    return index.parent if index else None


def pick_weights(filenames: Iterable[str]) -> list[str]:
    """The weights files to use among those of one part of a diffusers folder, or an empty list.

    Plain weights come before fp16 ones: both are converted on loading, and the plain ones lose nothing. Of a sharded set the
    index is returned; what it lists is needed with it.
    """
    names = set(filenames)
    for variant in ("", ".fp16", ".non_ema"):
        for stem in ("model", "diffusion_pytorch_model"):
            for name in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
                if name in names:
                    return [name]
    return []


def download_snapshot(repo_id: str, check: Callable[[Path], object], layout: Layout = DIFFUSERS) -> Path:
    """Fetches what training needs of a model into the hub cache and returns its folder.

    A broken download goes on where it stopped. Every weights file is compared with the SHA-256 that the hub lists.

    Args:
        check: called with the folder once the small files are there; raises ModelError to spare the rest.
    Raises:
        ModelError: no access, no such model, hub overloaded or broken, no network, or a file arrived damaged.
    """
    try:
        return _download(repo_id, check, layout)
    except ModelError:
        raise
    except Exception as error:  # httpx's, huggingface_hub's and the system's exceptions have no common base
        # The text of such an exception may hold addresses with signatures in them, so only its kind is told.
        raise ModelError(f"base_model {repo_id}: {_reason(error)}") from None


def _download(repo_id: str, check: Callable[[Path], object], layout: Layout) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repo_id, files_metadata=True)
    sha256 = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    if layout.marker not in sha256:
        raise ModelError(
            f"base_model {repo_id}: the hub has it, but not in the {layout.title} layout (no {layout.marker}). "
            "Download its .safetensors file and give its path."
        )

    def fetch(filename: str) -> Path:
        path = Path(hf_hub_download(repo_id, filename))
        wanted = sha256[filename]
        if wanted and file_sha256(path) != wanted:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise ModelError(
                f"base_model {repo_id}: {filename} arrived damaged and was deleted. Run the same command again."
            )
        return path

    folder = fetch(layout.marker).parent
    layout = layout.for_model(folder, f"base_model {repo_id}")
    for filename in sha256:
        part, _, rest = filename.rpartition("/")
        if part in layout.small and rest.endswith(layout.endings) and ".index" not in rest:
            fetch(filename)
    check(folder)
    for part in layout.parts:
        inside = {name.rpartition("/")[2]: name for name in sha256 if name.rpartition("/")[0] == part}
        picked = pick_weights(inside)
        if not picked:
            raise ModelError(
                f"base_model {repo_id}: the hub has no .safetensors file for its {part or 'weights'}; pickles are never "
                "loaded. Choose a version of the model that has them."
            )
        path = fetch(inside[picked[0]])
        if path.suffix == ".json":
            from lora_scripts.models.recognise import shard_names

            for shard in shard_names(path, repo_id):
                if shard not in inside:
                    raise ModelError(
                        f"base_model {repo_id}: the hub lacks {part}/{shard}. Choose another version of the model."
                    )
                fetch(inside[shard])
    return folder


def _reason(error: BaseException) -> str:
    """What went wrong on the way to the hub, without addresses or tokens."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for link in chain:
        response: Any = getattr(link, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int) and status >= 400:
            return _status_reason(status)
        if isinstance(link, OSError) and link.errno == errno.ENOSPC:
            return "no room left on the disk for the download. Free some space and run the same command again; it goes on where it stopped."
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in chain):
        return "not in the local hub cache, and HF_HUB_OFFLINE forbids fetching it. Unset HF_HUB_OFFLINE, or give the path of a model on this machine."
    return (
        f"the hub could not be reached, or the download broke off ({type(error).__name__}). Check the network and run the same "
        "command again (a download goes on where it stopped), or give the path of a model on this machine."
    )


def _status_reason(status: int) -> str:
    if status in (401, 403):
        return (
            f"the hub refused access ({status}): there is no such model, or it is private, or its terms have to be accepted first. "
            "Check the spelling; accept the terms on its page and log in with `hf auth login`; or give the path of a model on this machine."
        )
    if status == 404:
        return "the hub has no such model (404). Check the spelling, or give the path of a model on this machine."
    if status == 429:
        return "the hub takes no more requests for now (429). Wait some minutes and run the same command again; it goes on where it stopped."
    if status >= 500:
        return f"the hub is out of order ({status}). Run the same command again later; it goes on where it stopped."
    return f"the hub answered with status {status}. Give the path of a model on this machine."
