"""How probable the answers of pairs are for the model as it is before training, computed once.

DPO needs it in every step. The base model does not change, so no second model is held, and no second pass is made later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from lora_scripts.data.cache import EncodingCache, cache_key
from lora_scripts.data.sampler import Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.dialogues.pair_batches import PairBatches, TrainedPair
    from lora_scripts.families.protocol import Batch

__all__ = ["with_reference"]

PAIRS_PER_CHUNK = 200
"""As many as are kept in one file of the cache: a crash costs one chunk."""


class PairScorer(Protocol):
    """The part of a language family that is asked."""

    def pair_log_probs(self, batch: Batch) -> Tensor:
        """[2,B] log probability of each preferred answer, and of each other one."""
        ...


def with_reference(
    data: PairBatches,
    family: PairScorer,
    fingerprint: str,
    *,
    batch_size: int,
    device: torch.device,
    cache: EncodingCache,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> PairBatches:
    """The same pairs with `reference` filled, from the cache where possible.

    Args:
        family: with no adapter, or one that is switched off.
        fingerprint: of all that decides about the model's numbers: weights, dtype, quantization, device.
        batch_size: pairs in one pass at most.
        progress: told (what, done, total) between chunks; may raise to stop.
    """
    import torch

    plain, pairs = replace(data, reference={}), data.pairs
    found: dict[str, tuple[float, float]] = {}
    progress("reference", 0, len(pairs))
    for start in range(0, len(pairs), PAIRS_PER_CHUNK):
        chunk = range(start, min(start + PAIRS_PER_CHUNK, len(pairs)))
        key = cache_key("reference", model=fingerprint, batch_size=batch_size, pairs=_digest(pairs[i] for i in chunk))
        stored = cache.get("reference", key)
        values = stored["log_probs"] if stored is not None else None
        if values is None:
            values = torch.empty(len(chunk), 2)
            for group in _alike(chunk, pairs, batch_size):
                batch = plain.batch([Sample(index, f"reference/{index}") for index in group], device)
                with torch.no_grad():
                    log_probs = family.pair_log_probs(batch).T.cpu()
                values[torch.tensor([index - start for index in group])] = log_probs
            cache.put("reference", key, {"log_probs": values})
        found.update((pairs[index].name, tuple(row)) for index, row in zip(chunk, values.tolist(), strict=True))
        progress("reference", chunk.stop, len(pairs))
    return replace(data, reference=found)


def _alike(chunk: range, pairs: Sequence[TrainedPair], most: int) -> list[list[int]]:
    """The places cut into passes of one shape each."""
    groups: list[list[int]] = []
    for index in sorted(chunk, key=lambda place: (pairs[place].shape, pairs[place].cost)):
        if not groups or len(groups[-1]) == most or pairs[groups[-1][0]].shape != pairs[index].shape:
            groups.append([])
        groups[-1].append(index)
    return groups


def _digest(pairs: Iterable[TrainedPair]) -> str:
    whole = hashlib.sha256()
    for pair in pairs:
        for sequence in pair.sequences:
            whole.update(sequence.tokens.tobytes())
            whole.update(sequence.trained.tobytes())
    return whole.hexdigest()
