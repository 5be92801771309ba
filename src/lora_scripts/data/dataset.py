"""The pictures of a run with their captions: names, sizes and digests; nothing is decoded here."""

from __future__ import annotations

import fnmatch
import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig, Size
from lora_scripts.data.buckets import Fit, bucket_sizes, fit_into
from lora_scripts.data.captions import with_trigger
from lora_scripts.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lora_scripts.data.metadata import CaptionTable

__all__ = ["Dataset", "Example", "LeftOut", "open_dataset", "require_folder", "unnamed"]


@dataclass(frozen=True)
class Example:
    """One picture that trains.

    Attributes:
        name: path relative to the data folder, with forward slashes; unique.
        size: width and height in pixels after the EXIF turn.
        fit: how it becomes its bucket's shape.
        caption: with the trigger word, before shuffling and dropout.
        digest: sha256 of the file's bytes, hexadecimal.
    """

    name: str
    path: Path
    size: Size
    fit: Fit
    caption: str
    repeats: int
    digest: str

    @property
    def shape(self) -> Size:
        """Width and height of its bucket in pixels."""
        return self.fit.bucket

    @property
    def cost(self) -> int:
        """Pixels."""
        return self.fit.bucket[0] * self.fit.bucket[1]


@dataclass(frozen=True)
class LeftOut:
    """A picture that does not train, and why.

    Attributes:
        changed: the file was another one when the run began.
    """

    name: str
    reason: str
    changed: bool = False


@dataclass(frozen=True)
class Dataset:
    """What trains, what does not, and what was noticed on the way."""

    examples: Sequence[Example]
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def digest(self) -> str:
        """Changes when any picture, caption, shape or repeat changes; the folder's place does not matter."""
        whole = hashlib.sha256()
        for example in self.examples:
            row = (example.name, example.digest, example.caption, example.repeats, example.fit.bucket)
            whole.update(repr(row).encode())
        return whole.hexdigest()

    @property
    def bucket_counts(self) -> dict[Size, int]:
        return dict(sorted(Counter(example.fit.bucket for example in self.examples).items()))

    def identity(self) -> dict[str, str]:
        """Name -> content, shape and caption of every picture."""
        return {
            each.name: f"{each.digest[:16]} {each.shape[0]}x{each.shape[1]} {each.caption!r}" for each in self.examples
        }

    def without(self, failures: Sequence[LeftOut]) -> Dataset:
        """The data set less the pictures that turned out to be unreadable."""
        names = {failure.name for failure in failures}
        kept = [example for example in self.examples if example.name not in names]
        return replace(self, examples=kept, left_out=[*self.left_out, *failures])

    def summary(self) -> list[str]:
        """How many pictures train, and the names of those that do not, one line each."""
        total = len(self.examples) + len(self.left_out)
        left_out = [f"  left out: {item.name}: {item.reason}" for item in self.left_out]
        return [f"{len(self.examples)} of {total} pictures train.", *left_out]


def open_dataset(config: RunConfig, resolution: Size) -> Dataset:
    """The pictures of a run, each with its caption and shape, in the order of their names.

    Raises:
        DataError: the folder or the caption table cannot be used, or no picture is left to train on.
        ConfigError: the batch size is more than all pictures.
    """
    from lora_scripts.data.metadata import read_captions

    folder = require_folder(config)
    table = read_captions(folder, config.metadata_path)
    # A picture without a caption trains without one where there are no captions at all; a table leaves out what it lacks.
    unusable = {
        problem.name: problem.reason
        for problem in table.problems
        if problem.kind == "bad name" or (problem.kind == "no caption" and table.source is not None)
    }
    step = config.bucket_step
    shapes = bucket_sizes(resolution, step, config.max_aspect) if config.buckets else [resolution]

    left_out = []
    wanted = []
    for name in table.pictures:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.exclude):
            left_out.append(LeftOut(_shown(name), "named in exclude"))
        elif name in unusable:
            left_out.append(LeftOut(_shown(name), unusable[name]))
        else:
            wanted.append(name)

    def examine(name: str) -> Example | LeftOut:
        from lora_scripts.data.images import image_digest, image_size

        path = folder / name
        try:
            size = image_size(path)
            digest = image_digest(path)
        except DataError as error:
            return LeftOut(name, unnamed(error, path))
        fit = fit_into(size, shapes)
        if not config.upscale and fit.upscales(size):
            return LeftOut(name, f"{size[0]}x{size[1]} is smaller than its shape {fit.bucket[0]}x{fit.bucket[1]}")
        caption = with_trigger(table.captions.get(name, ""), config.trigger_word)
        repeats = config.repeats * table.repeats.get(name, 1)
        return Example(name, path, size, fit, caption, repeats, digest)

    with ThreadPoolExecutor(max_workers=4) as pool:
        examined = list(pool.map(examine, wanted))
    examples = [item for item in examined if isinstance(item, Example)]
    left_out += [item for item in examined if isinstance(item, LeftOut)]
    dataset = Dataset(examples, left_out, (*table.notes, *_useless_rows(table)))
    require_examples(dataset, folder)
    _require_batch(config, dataset)
    return dataset


def _useless_rows(table: CaptionTable) -> list[str]:
    """Lines about rows and caption files that no picture got its caption from."""
    problems = [problem for problem in table.problems if problem.kind not in ("no caption", "bad name")]
    source = table.source.name if table.source else "captions"
    lines = [f"{source}: no use for {_shown(problem.name)!r} ({problem.reason})." for problem in problems[:10]]
    return [*lines, f"{source}: no use for {len(problems) - 10} more rows."] if len(problems) > 10 else lines


def _shown(name: str) -> str:
    """The name as logs and reports can hold it: a file system may give bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def unnamed(error: DataError, path: Path) -> str:
    """The error's text without the picture's name in front, for places that show the name themselves."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path.name}: ")


def require_folder(config: RunConfig) -> Path:
    """The folder of pictures; raises DataError when it is not there. Cheap, so it is asked before weights are read."""
    if not config.train_data_dir.is_dir():
        raise DataError(
            f"train_data_dir: {config.train_data_dir}: no such folder. Put the pictures there, or correct the path."
        )
    return config.train_data_dir


def _require_batch(config: RunConfig, dataset: Dataset) -> None:
    """Raises ConfigError when the user wrote a batch that the data set can never fill; the default adapts in silence."""
    uses = sum(example.repeats for example in dataset.examples)
    if "batch_size" in config.model_fields_set and config.batch_size != "auto" and config.batch_size > uses:
        raise ConfigError(
            f"batch_size: {config.batch_size} is more than the {uses} pictures of an epoch, so it is never filled. "
            f"Set batch_size: {uses} or less, or add pictures."
        )


def require_examples(dataset: Dataset, folder: Path) -> None:
    """Raises DataError, with the reasons, when nothing is left to train on."""
    if dataset.examples:
        return
    reasons = "\n".join(f"  {item.name}: {item.reason}" for item in dataset.left_out[:20])
    if reasons:
        raise DataError(f"{folder}: none of its {len(dataset.left_out)} pictures can be trained on:\n{reasons}")
    raise DataError(
        f"{folder}: holds no pictures (jpg, png, webp, bmp, gif, tiff). Put them there, or correct the path."
    )
