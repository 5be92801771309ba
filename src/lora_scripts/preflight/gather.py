"""The facts that checks judge: of every picture once and then from the cache, of captions, of files left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache, cache_key
from lora_scripts.data.dataset import Dataset, Example, LeftOut, unnamed
from lora_scripts.data.folders import PictureSource
from lora_scripts.data.images import image_digest
from lora_scripts.data.masks import fitted_mask
from lora_scripts.errors import DataError
from lora_scripts.preflight.picture_facts import FORMAT, PictureFacts, measure

__all__ = ["DataFacts", "gather"]

Progress = Callable[[str, int, int], None]
KIND = "facts"
"""Folder in the cache."""


@dataclass(frozen=True)
class DataFacts:
    """What is known of a data set before any check.

    Attributes:
        examples: the pictures that train, less those that turned out to be unreadable.
        pictures: their measurements, by name.
        unreadable: pictures that cannot be decoded, with the reason; those named in `exclude` are not counted.
        without_caption: names of pictures left out because the caption table lacks them.
        written: captions as written, by name, before the trigger word is added.
        num_pictures: of all folders, less those named in `exclude`.
        sources: the folders.
        masks: of pictures with a mask, the share of what trains of them that it lets be learnt, 0..1.
        bad_masks: pictures left out because their mask cannot be read.
        unused_masks: masks that belong to no picture.
    """

    examples: Sequence[Example]
    pictures: Mapping[str, PictureFacts]
    unreadable: Sequence[LeftOut]
    without_caption: Sequence[str]
    written: Mapping[str, str]
    num_pictures: int
    sources: Sequence[PictureSource]
    masks: Mapping[str, float]
    bad_masks: Sequence[LeftOut]
    unused_masks: Sequence[str]

    @property
    def learnt(self) -> list[Example]:
        """The examples that are not for regularization."""
        return [example for example in self.examples if not example.is_regularization]


def gather(config: RunConfig, dataset: Dataset, cache: EncodingCache, progress: Progress) -> DataFacts:
    """Measures every picture that is not in the cache yet, and asks why others were left out."""
    pictures, unreadable = _measure_all(dataset.examples, cache, config.num_workers, progress)
    masks, bad_masks = _measure_masks(dataset.examples, cache)
    why = {item.name: item.why for item in dataset.left_out}
    return DataFacts(
        [example for example in dataset.examples if example.name in pictures],
        pictures,
        [*unreadable, *(item for item in dataset.left_out if item.why == "unreadable")],
        [name for name, reason in why.items() if reason == "no caption"],
        dataset.written,
        len(dataset.examples) + sum(reason != "excluded" for reason in why.values()),
        dataset.sources,
        masks,
        [*bad_masks, *(item for item in dataset.left_out if item.why == "mask")],
        dataset.unused_masks,
    )


def _measure_masks(examples: Sequence[Example], cache: EncodingCache) -> tuple[dict[str, float], list[LeftOut]]:
    """How much of each picture its mask lets be learnt, and the masks that cannot be decoded."""
    import torch

    shares: dict[str, float] = {}
    failed: list[LeftOut] = []
    for example in examples:
        mask, fit = example.mask, example.fit
        if mask is None:
            continue
        place = [*fit.bucket, *fit.scaled, fit.left, fit.top]
        key = cache_key(f"mask facts {FORMAT}", mask=mask.digest, kind=mask.kind, fit=place)
        stored = cache.get(KIND, key)
        if stored is None:
            try:
                stored = {"share": fitted_mask(mask, fit).mean(dtype=torch.float64)}
            except DataError as error:
                failed.append(LeftOut(example.name, f"its mask cannot be used: {error}", why="mask"))
                continue
            cache.put(KIND, key, stored)
        shares[example.name] = float(stored["share"])
    return shares, failed


def _measure_all(
    examples: Sequence[Example], cache: EncodingCache, num_workers: int | str, progress: Progress
) -> tuple[dict[str, PictureFacts], list[LeftOut]]:
    def one(example: Example) -> PictureFacts | LeftOut:
        key = cache_key(f"picture facts {FORMAT}", picture=example.digest)
        stored = cache.get(KIND, key)
        if stored is not None:
            return PictureFacts.from_tensors(stored)
        try:
            facts = measure(example.path)
            # Asked after reading: facts are stored under the listed digest, so they must be of that very file.
            unchanged = image_digest(example.path) == example.digest
        except DataError as error:
            return LeftOut(example.name, unnamed(error, example.path))
        if unchanged:
            cache.put(KIND, key, facts.to_tensors())
        return facts

    # Decoders let go of the interpreter's lock, so threads are enough; more than cores only take memory.
    workers = num_workers if isinstance(num_workers, int) else min(8, os.cpu_count() or 1)
    found: dict[str, PictureFacts] = {}
    failed: list[LeftOut] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        try:
            for done, (example, facts) in enumerate(zip(examples, pool.map(one, examples), strict=True), start=1):
                if isinstance(facts, LeftOut):
                    failed.append(facts)
                else:
                    found[example.name] = facts
                progress("check", done, len(examples))
        except BaseException:
            # Who wants to stop does not wait for thousands of pictures that are still in the queue.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found, failed
