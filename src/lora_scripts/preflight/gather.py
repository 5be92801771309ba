"""The facts that checks judge: of every picture once and then from the cache, of captions, of files left out."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache, cache_key
from lora_scripts.data.dataset import Dataset, Example, LeftOut, unnamed
from lora_scripts.data.images import image_digest, image_size
from lora_scripts.data.metadata import read_captions
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
        num_pictures: of the folder, less those named in `exclude`.
    """

    examples: Sequence[Example]
    pictures: Mapping[str, PictureFacts]
    unreadable: Sequence[LeftOut]
    without_caption: Sequence[str]
    written: Mapping[str, str]
    num_pictures: int


def gather(config: RunConfig, dataset: Dataset, cache: EncodingCache, progress: Progress) -> DataFacts:
    """Measures every picture that is not in the cache yet, and asks why others were left out."""
    table = read_captions(config.train_data_dir, config.metadata_path)
    uncaptioned = {problem.name for problem in table.problems if problem.kind == "no caption"}
    pictures, unreadable = _measure_all(dataset.examples, cache, config.num_workers, progress)
    without_caption = []
    excluded = 0
    for item in dataset.left_out:
        if any(fnmatch.fnmatchcase(item.name, pattern) for pattern in config.exclude):
            excluded += 1
        elif item.name in uncaptioned and table.source is not None:
            without_caption.append(item.name)
        elif not _has_size(config, item):
            unreadable.append(item)
    return DataFacts(
        [example for example in dataset.examples if example.name in pictures],
        pictures,
        unreadable,
        without_caption,
        table.captions,
        len(dataset.examples) + len(dataset.left_out) - excluded,
    )


def _has_size(config: RunConfig, item: LeftOut) -> bool:
    """Whether a picture that was left out can at least be opened: then it was left out for another reason."""
    try:
        image_size(config.train_data_dir / item.name)
    except DataError:
        return False
    return True


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
