"""An adapter that begins as a file, of whatever kind: `init_lora_weights`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lora_scripts.adapter_files.for_model import open_for_model
from lora_scripts.adapters.taking_over import bring_over, tell_brought_over
from lora_scripts.errors import ModelError
from lora_scripts.lora_content import content_digest, content_files

if TYPE_CHECKING:
    from pathlib import Path

    from lora_scripts.adapter_files.adapter_file import AdapterFile
    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.adapters.taking_over import BroughtOver
    from lora_scripts.adapters.weights import LayerChange

__all__ = ["go_on_from", "older_digest", "open_for_init", "seed_of_draws"]


def older_digest(path: Path | None) -> str | None:
    """What stands for the content of `init_lora_weights`; None where a run begins from scratch."""
    return None if path is None else content_digest(list(content_files(path)))


def seed_of_draws(seed: int, digest: str | None) -> int:
    """The seed of noise, noise levels and order: the run's own, or on going on one of its own for every older LoRA.

    With the run's own seed, which most users leave at its default, the older LoRA's pictures would come with the very noise
    that it has been trained on already, and on the same data the whole older run would be played again.

    Args:
        seed: the run's.
        digest: of what `init_lora_weights` holds, see `lora_content`; None for a run from scratch.
    """
    if digest is None:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{digest}".encode(), digest_size=7).digest(), "little")


def open_for_init(path: Path, layers: Mapping[str, tuple[int, ...]]) -> AdapterFile:
    """The file of `init_lora_weights`; its tensors are unread.

    Raises:
        ModelError: no adapter, damaged, or with layers that the model lacks.
    """
    try:
        return open_for_model(path, layers)
    except ModelError as error:
        raise ModelError(f"init_lora_weights: {error}") from None


def go_on_from(adapter: Adapter, older: AdapterFile) -> list[str]:
    """Starts the adapter from a file of any kind, reading one layer at a time; messages for the user.

    Raises:
        ModelError: nothing fits, a layer is damaged, or the adapter cannot go on from a change of that kind.
    """
    changes: dict[str, LayerChange] = {}
    brought: list[BroughtOver] = []
    for name in older.layers:
        try:
            change = older.layer(name)
        except ModelError as error:
            raise ModelError(f"init_lora_weights: {error}") from None
        if name not in adapter.layers:
            continue  # looked at all the same: a NaN there means that the training had diverged in every layer
        weight = partial(adapter.base_weight, name)
        changes[name], made = bring_over(name, change, adapter.layers[name], weight)
        brought += [made] if made is not None else []
    left_out = [name for name in older.layers if name not in adapter.layers]
    told = adapter.load_weights(changes, strict=False, left_out=left_out)
    if left_out:
        told.append(f"init_lora_weights: what was left out changes nothing in this run. {_way_on(left_out, older)}")
    return [*told, *tell_brought_over(brought)]


def _way_on(left_out: Sequence[str], older: AdapterFile) -> str:
    """How layers that a file has and this run does not train can be kept."""
    ways = []
    if any(name.startswith("text_encoder") for name in left_out):
        ways.append("train_text_encoder: true trains those of the text encoder")
    shapes = [older.layers[name].model_shape for name in left_out if not name.startswith("text_encoder")]
    if any(shape is not None and len(shape) == 4 and shape[2:] != (1, 1) for shape in shapes):
        ways.append("adapter: locon trains convolutions")
    elif shapes:
        ways.append("target_modules trains any layer")
    return f"{'; '.join(ways)}. As an entry of base_loras the whole file stays at work, without being trained."
