"""Every example encoded once: from the cache where possible, else decoded, fitted and run through the family's encoders.

Pictures are read here for the last time: what happens to the files afterwards, the run does not notice. What happens to them
before, since the data set was listed, is noticed by their digest.

Legend for shapes: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_scripts.data.buckets import Framing, fit_image
from lora_scripts.data.cache import EncodingCache, cache_key
from lora_scripts.data.captions import CaptionSettings, fraction
from lora_scripts.data.dataset import Dataset, Example, LeftOut, unnamed
from lora_scripts.data.masks import ChangedMaskError, fitted_mask
from lora_scripts.data.sampler import Sample
from lora_scripts.errors import DataError, ModelError
from lora_scripts.families.protocol import Batch, Encoder

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["EncodedDataset", "encode_all", "image_to_pixels"]

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) while encoding."""

MOST_CHANGED = 0.02
"""Share of pictures that may change or vanish between listing and reading; beyond it somebody is at work in the folder."""


def image_to_pixels(image: Image) -> Tensor:
    """[3,H,W] float32 in [-1,1] from an RGB picture."""
    import numpy as np
    import torch

    array = np.asarray(image, dtype=np.uint8).copy()
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


@dataclass
class EncodedDataset:
    """Encodings in memory, and how a step's examples become a batch.

    Attributes:
        images: (example index, mirrored) -> that view's tensors.
        texts: caption text -> its tensors; empty when captions are encoded in the loss.
        home: the device where all of them lie; None for the computer's own memory.
    """

    dataset: Dataset
    captions: CaptionSettings
    flip: bool
    images: Mapping[tuple[int, bool], Mapping[str, Tensor]]
    texts: Mapping[str, Mapping[str, Tensor]]
    home: torch.device | None = None

    def at_home_on(self, device: torch.device, most_bytes: int) -> EncodedDataset:
        """The same with all encodings on the device, where they take no more than so much of its memory."""
        rows = [*self.images.values(), *self.texts.values()]
        if sum(tensor.nbytes for row in rows for tensor in row.values()) > most_bytes:
            return self
        images = {view: {name: t.to(device) for name, t in row.items()} for view, row in self.images.items()}
        texts = {text: {name: t.to(device) for name, t in row.items()} for text, row in self.texts.items()}
        return replace(self, images=images, texts=texts, home=device)

    @property
    def examples(self) -> Sequence[Example]:
        return self.dataset.examples

    def part(self, indices: Sequence[int]) -> EncodedDataset:
        """Some of the examples, in the order given."""
        images = {
            (new, mirrored): self.images[old, mirrored]
            for new, old in enumerate(indices)
            for mirrored in (False, True)
            if (old, mirrored) in self.images
        }
        dataset = replace(self.dataset, examples=[self.dataset.examples[i] for i in indices])
        return replace(self, dataset=dataset, images=images)

    def as_written(self) -> EncodedDataset:
        """The same without mirroring, and with one fixed text per picture."""
        settings = replace(self.captions, dropout=0.0, variants=1 if self.captions.variants else None, several=False)
        if self.captions.shuffle and settings.variants is None:
            settings = replace(settings, shuffle=False)  # not encoded ahead, so the text as written can be used
        return replace(self, flip=False, captions=settings)

    def batch(self, samples: Sequence[Sample], device: torch.device) -> Batch:
        """The examples of one micro-batch, stacked on the device."""
        import torch

        examples = [self.dataset.examples[sample.index] for sample in samples]
        captions, rows = [], []
        for example, sample in zip(examples, samples, strict=True):
            caption = self.captions.pick(example.captions, sample.key)
            mirrored = self.flip and fraction(self.captions.seed, "flip", sample.key) < 0.5
            captions.append(caption)
            rows.append({**self.images[sample.index, mirrored], **self.texts.get(caption, {})})
        tensors = {
            name: torch.stack([row[name] for row in rows]).to(device, non_blocking=True) for name in (rows[0] or {})
        }
        weights = [example.weight for example in examples]
        if set(weights) != {1.0}:
            tensors["weight"] = torch.tensor(weights).to(device, non_blocking=True)
        return Batch(tensors, captions, [s.key for s in samples], [s.stratum for s in samples])


@dataclass(frozen=True)
class _View:
    """One picture as one bucket sees it."""

    index: int
    mirrored: bool


def encode_all(
    dataset: Dataset,
    encoders: Sequence[Encoder],
    captions: CaptionSettings,
    cache: EncodingCache,
    *,
    flip: bool,
    num_workers: int,
    progress: Progress = lambda what, done, total: None,
    empty_masks: bool = True,
) -> EncodedDataset:
    """Encodes every view and every caption; pictures that cannot be decoded or encoded leave the data set, named.

    Args:
        empty_masks: whether a picture whose mask is empty stays: something of it is learnt all the same.
    Raises:
        DataError: no picture could be decoded, or more than 2 % of them were changed or removed since they were listed.
        ModelError: a caption's encoding is not finite.
    """
    images: dict[tuple[int, bool], dict[str, Tensor]] = {}
    texts: dict[str, dict[str, Tensor]] = {}
    failures: dict[int, LeftOut] = {}
    notes: list[str] = []
    views = [_View(i, m) for i in range(len(dataset.examples)) for m in ((False, True) if flip else (False,))]
    for encoder in encoders:
        if encoder.reads == "image":
            _encode_views(dataset.examples, views, encoder, cache, num_workers, images, failures, notes, progress)
        elif encoder.reads == "mask":
            _encode_masks(dataset.examples, views, encoder, cache, num_workers, images, failures, empty_masks, progress)
        elif encoder.reads == "fit":
            _encode_framings(dataset.examples, views, encoder, images)
        else:
            wanted = captions.possible(text for example in dataset.examples for text in example.captions)
            _encode_texts(wanted, encoder, cache, texts, progress)
    if failures:
        kept = [i for i in range(len(dataset.examples)) if i not in failures]
        images = {(new, m): images[old, m] for new, old in enumerate(kept) for m in (False, True) if (old, m) in images}
        before, dataset = dataset, dataset.without(list(failures.values()))
        if not dataset.examples or (before.learnt and not dataset.learnt):
            raise DataError(
                "no picture could be decoded:\n" + "\n".join(f"  {f.name}: {f.reason}" for f in failures.values())
            )
    dataset = replace(dataset, notes=[*dataset.notes, *dict.fromkeys(notes)])
    return EncodedDataset(dataset, captions, flip, images, texts)


def _encode_views(
    examples: Sequence[Example],
    views: Sequence[_View],
    encoder: Encoder,
    cache: EncodingCache,
    num_workers: int,
    images: dict[tuple[int, bool], dict[str, Tensor]],
    failures: dict[int, LeftOut],
    notes: list[str],
    progress: Progress,
) -> None:
    def key(view: _View) -> str:
        example = examples[view.index]
        fit = [*example.fit.bucket, *example.fit.scaled, example.fit.left, example.fit.top]
        return cache_key(encoder.fingerprint, picture=example.digest, fit=fit, mirrored=view.mirrored)

    missing = []
    for view in views:
        stored = cache.get(encoder.name, key(view))
        if stored is None or not _finite(stored):
            missing.append(view)
        else:
            images.setdefault((view.index, view.mirrored), {}).update(stored)
    # One shape at a time, so that the encoder gets whole batches.
    missing.sort(key=lambda view: (examples[view.index].fit.bucket, view.index, view.mirrored))

    done = len(views) - len(missing)
    progress(encoder.name, done, len(views))
    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        for group in _shape_groups(missing, examples, encoder.batch_size):
            ready = []
            for view, loaded in zip(
                group, pool.map(lambda view: _load(examples[view.index], view.mirrored), group), strict=True
            ):
                if isinstance(loaded, LeftOut):
                    failures[view.index] = loaded
                else:
                    ready.append((view, loaded))
            _require_few_changes(failures.values(), len(examples))
            encoded, again = _encode(encoder, [pixels for _, pixels in ready])
            for number, ((view, _), tensors) in enumerate(zip(ready, encoded, strict=True)):
                name = examples[view.index].name
                if tensors is None:
                    failures[view.index] = LeftOut(name, _NOT_FINITE)
                    continue
                if number in again:
                    notes.append(f"{name}: its encoding was not finite in half precision; encoded again in float32.")
                cache.put(encoder.name, key(view), tensors)
                images.setdefault((view.index, view.mirrored), {}).update(tensors)
            done += len(group)
            progress(encoder.name, done, len(views))


def _encode_masks(
    examples: Sequence[Example],
    views: Sequence[_View],
    encoder: Encoder,
    cache: EncodingCache,
    num_workers: int,
    images: dict[tuple[int, bool], dict[str, Tensor]],
    failures: dict[int, LeftOut],
    empty_masks: bool,
    progress: Progress,
) -> None:
    """Of every view how much is learnt of what; a view without a mask is learnt whole."""
    import torch

    def one(view: _View) -> Mapping[str, Tensor] | LeftOut:
        example = examples[view.index]
        mask, (width, height) = example.mask, example.fit.bucket
        if mask is None:
            return encoder.run([torch.ones(1, height, width)])[0]
        fit = [width, height, *example.fit.scaled, example.fit.left, example.fit.top]
        key = cache_key(encoder.fingerprint, mask=mask.digest, kind=mask.kind, fit=fit, mirrored=view.mirrored)
        stored = cache.get(encoder.name, key)
        if stored is None:
            try:
                stored = encoder.run([fitted_mask(mask, example.fit, view.mirrored)])[0]
            except DataError as error:
                changed = isinstance(error, ChangedMaskError)
                return LeftOut(example.name, f"its mask cannot be used: {error}", changed, "mask")
            cache.put(encoder.name, key, stored)
        if not empty_masks and not any(bool(tensor.any()) for tensor in stored.values()):
            return LeftOut(example.name, "its mask is empty, so nothing of it would be learnt", why="mask")
        return stored

    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        for done, (view, found) in enumerate(zip(views, pool.map(one, views), strict=True), start=1):
            if isinstance(found, LeftOut):
                failures.setdefault(view.index, found)
            else:
                images.setdefault((view.index, view.mirrored), {}).update(found)
            progress(encoder.name, done, len(views))
    _require_few_changes(failures.values(), len(examples))


def _encode_framings(
    examples: Sequence[Example],
    views: Sequence[_View],
    encoder: Encoder,
    images: dict[tuple[int, bool], dict[str, Tensor]],
) -> None:
    """What follows from a view's size and crop alone: counted anew each time, which takes less than to read it from a cache."""
    framings = [Framing(examples[view.index].size, examples[view.index].fit, view.mirrored) for view in views]
    for view, tensors in zip(views, encoder.run(framings), strict=True):
        images.setdefault((view.index, view.mirrored), {}).update(tensors)


_NOT_FINITE = "the base model's encoder gives numbers for it that are not finite, in float32 too. Another VAE may help."


def _load(example: Example, mirrored: bool) -> Tensor | LeftOut:
    """Pixels [3,H,W], or why there are none; a file that is no longer the one that was listed is not used."""
    from lora_scripts.data.images import image_digest, read_image

    loaded: Tensor | LeftOut
    try:
        loaded = image_to_pixels(fit_image(read_image(example.path), example.fit, mirrored))
    except DataError as error:
        loaded = LeftOut(example.name, unnamed(error, example.path))
    # Asked after reading, so that no change before or during it goes unnoticed: the cache files by the listed digest.
    try:
        changed = (
            "" if image_digest(example.path) == example.digest else "was changed while the run was reading the pictures"
        )
    except DataError as error:
        changed = unnamed(error, example.path)
    return LeftOut(example.name, changed, changed=True) if changed else loaded


def _require_few_changes(failures: Iterable[LeftOut], num_pictures: int) -> None:
    """Raises DataError when more than 2 % of the pictures are not what they were when the run began."""
    changed = [failure for failure in failures if failure.changed]
    if len(changed) > MOST_CHANGED * num_pictures:
        named = "\n".join(f"  {failure.name}: {failure.reason}" for failure in changed[:10])
        more = f"\n  and {len(changed) - 10} more" if len(changed) > 10 else ""
        raise DataError(
            f"{len(changed)} of {num_pictures} pictures changed since the run began, more than {MOST_CHANGED:.0%}:\n{named}{more}\n"
            "Is another program at work in the folder? Run the same command again when it is done; what is encoded is kept."
        )


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _encode(encoder: Encoder, inputs: Sequence[Any]) -> tuple[list[dict[str, Tensor] | None], set[int]]:
    """The inputs' encodings, None where none is finite, and the positions of those that only float32 made finite."""
    encoded: list[dict[str, Tensor] | None] = list(encoder.run(inputs)) if inputs else []
    again = set()
    for position, tensors in enumerate(encoded):
        if tensors is None or _finite(tensors):
            continue
        encoded[position] = None
        if encoder.exact is not None and _finite(exact := encoder.exact([inputs[position]])[0]):
            encoded[position] = exact
            again.add(position)
    return encoded, again


def _shape_groups(views: Sequence[_View], examples: Sequence[Example], most: int) -> Iterator[list[_View]]:
    group: list[_View] = []
    for view in views:
        shape = examples[view.index].fit.bucket
        if group and (len(group) == most or examples[group[0].index].fit.bucket != shape):
            yield group
            group = []
        group.append(view)
    if group:
        yield group


def _encode_texts(
    wanted: Iterable[str],
    encoder: Encoder,
    cache: EncodingCache,
    texts: dict[str, dict[str, Tensor]],
    progress: Progress,
) -> None:
    wanted = list(wanted)
    missing = []
    for text in wanted:
        stored = cache.get(encoder.name, cache_key(encoder.fingerprint, caption=text))
        if stored is None or not _finite(stored):
            missing.append(text)
        else:
            texts.setdefault(text, {}).update(stored)
    progress(encoder.name, len(wanted) - len(missing), len(wanted))
    for start in range(0, len(missing), encoder.batch_size):
        group = missing[start : start + encoder.batch_size]
        for text, tensors in zip(group, _encode(encoder, group)[0], strict=True):
            if tensors is None:
                raise ModelError(
                    f"the text encoder gives numbers that are not finite for the caption {text[:80]!r}. "
                    "Set mixed_precision: fp32; if that does not help, the base model is broken."
                )
            cache.put(encoder.name, cache_key(encoder.fingerprint, caption=text), tensors)
            texts.setdefault(text, {}).update(tensors)
        progress(encoder.name, len(wanted) - len(missing) + start + len(group), len(wanted))
