"""The pictures of a run with their captions: names, sizes and digests; nothing is decoded here."""

from __future__ import annotations

import fnmatch
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from lora_scripts.config import RunConfig, Size
from lora_scripts.data.buckets import Fit, bucket_sizes, fit_into
from lora_scripts.data.captions import with_trigger
from lora_scripts.data.folders import PictureSource, folders_inside, require_folders
from lora_scripts.data.masks import Mask, MaskFolder, open_mask
from lora_scripts.data.sampler import total_uses
from lora_scripts.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lora_scripts.data.metadata import CaptionTable

__all__ = ["Dataset", "Example", "LeftOut", "open_dataset", "unnamed"]

Why = Literal["other", "excluded", "no caption", "unreadable", "mask"]


@dataclass(frozen=True)
class Example:
    """One picture that trains.

    Attributes:
        name: path relative to its folder, with forward slashes, behind the folder's name where `folders` has it; unique.
        size: width and height in pixels after the EXIF turn.
        fit: how it becomes its bucket's shape.
        caption: with the trigger word, before shuffling and dropout; of several the first.
        mask: says which parts of it are learnt; None for all of it.
        more_captions: the others, one of all is drawn for each use.
        digest: sha256 of the file's bytes, hexadecimal.
        folder: name of the folder among the run's folders that it comes from.
        weight: how much it counts in the loss.
        is_regularization: it keeps what the model knows and is not what is to be learnt.
    """

    name: str
    path: Path
    size: Size
    fit: Fit
    caption: str
    repeats: int
    digest: str
    folder: str = ""
    weight: float = 1.0
    is_regularization: bool = False
    more_captions: tuple[str, ...] = ()
    mask: Mask | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """All of its captions."""
        return (self.caption, *self.more_captions)

    @property
    def shape(self) -> Size:
        """Width and height of its bucket in pixels."""
        return self.fit.bucket

    @property
    def cost(self) -> int:
        """Pixels."""
        return self.fit.bucket[0] * self.fit.bucket[1]

    def identity(self) -> str:
        """Content, shape, whatever else decides about training and is not as usual, and the caption, which may be long."""
        parts = [
            self.digest[:16],
            f"{self.shape[0]}x{self.shape[1]}",
            f"repeats {self.repeats}" if self.repeats != 1 else "",
            f"weight {self.weight:g}" if self.weight != 1 else "",
            "regularization" if self.is_regularization else "",
            f"mask {self.mask.digest[:8]}" if self.mask is not None and self.mask.kind == "file" else "",
            f"{len(self.captions)} captions" if self.more_captions else "",
            *map(repr, self.captions),
        ]
        return " ".join(filter(None, parts))


@dataclass(frozen=True)
class LeftOut:
    """A picture that does not train, and why.

    Attributes:
        changed: the file was another one when the run began.
        why: the kind of reason, for the checks.
        folder: name of the folder that it comes from, as of an example.
    """

    name: str
    reason: str
    changed: bool = False
    why: Why = "other"
    folder: str = ""


@dataclass(frozen=True)
class Dataset:
    """What trains, what does not, and what was noticed on the way.

    Attributes:
        written: captions as written, by name, before the trigger word is added.
        unused_masks: masks that belong to no picture.
        sources: the folders that the pictures come from.
    """

    examples: Sequence[Example]
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    written: Mapping[str, str] = field(default_factory=dict)
    sources: Sequence[PictureSource] = ()
    unused_masks: Sequence[str] = ()

    @property
    def digest(self) -> str:
        """Changes when any picture, caption, shape or repeat changes; the folder's place does not matter."""
        whole = hashlib.sha256()
        for example in self.examples:
            whole.update(repr((example.name, example.digest, example.identity())).encode())
        return whole.hexdigest()

    @property
    def learnt(self) -> list[Example]:
        """The pictures that are to be learnt: all but those for regularization."""
        return [example for example in self.examples if not example.is_regularization]

    @property
    def bucket_counts(self) -> dict[Size, int]:
        return dict(sorted(Counter(example.fit.bucket for example in self.examples).items()))

    def identity(self) -> dict[str, str]:
        """Name -> content, shape and caption of every picture."""
        return {each.name: each.identity() for each in self.examples}

    def by_folder(self) -> list[tuple[PictureSource, list[Example]]]:
        """Each folder with its pictures."""
        return [(source, [each for each in self.examples if each.folder == source.name]) for source in self.sources]

    def by_directory(self, examples: Sequence[Example]) -> dict[str, list[Example]]:
        """Some of the pictures by the name of their directory, as kohya's scripts tell folders apart in a file's header.

        Where two directories are called alike, the others bear the name of the one above as well.
        """
        places: dict[str, list[Example]] = {}
        for each in examples:
            inside = PurePosixPath(each.name).parent.as_posix()
            places.setdefault(inside if inside != "." else each.folder, []).append(each)
        names: dict[str, list[Example]] = {}
        for place, inside_it in places.items():
            short = place.rpartition("/")[2]
            names[short if short not in names else place.replace("/", "_")] = inside_it
        return names

    def without(self, failures: Sequence[LeftOut]) -> Dataset:
        """The data set less the pictures that turned out to be unreadable."""
        names = {failure.name for failure in failures}
        kept = [example for example in self.examples if example.name not in names]
        return replace(self, examples=kept, left_out=[*self.left_out, *failures])

    def summary(self) -> list[str]:
        """How many pictures train, and the names of those that do not, one line each."""
        left_out = [f"  left out: {item.name}: {item.reason}" for item in self.left_out]
        others = {source.name for source in self.sources if source.regularization}
        lost = sum(item.folder not in others for item in self.left_out)
        learnt = len(self.learnt)
        lines = [f"{learnt} of {learnt + lost} pictures train."]
        if others:
            mixed_in = len(self.examples) - learnt
            lines.append(f"{mixed_in} of {mixed_in + len(self.left_out) - lost} regularization pictures are mixed in.")
        return [*lines, *left_out]


@dataclass(frozen=True)
class _Candidate:
    """A picture that was found with its caption and not yet looked at."""

    name: str
    path: Path
    caption: str
    more: Sequence[str]
    repeats: int
    source: PictureSource
    mask: Path | None = None


def open_dataset(config: RunConfig, resolution: Size) -> Dataset:
    """The pictures of a run, each with its caption and shape: folder by folder, in the order of their names.

    Raises:
        DataError: a folder or a caption table cannot be used, or no picture of a folder is left to train on.
        ConfigError: the batch size is more than all pictures.
    """
    sources = require_folders(config)
    wanted: list[_Candidate] = []
    left_out: list[LeftOut] = []
    notes: list[str] = []
    unused_masks: list[str] = []
    for source in sources:
        listed = _list_folder(source, sources, config, left_out, notes)
        wanted += _with_masks(listed, source, unused_masks) if config.masked_loss == "folder" else listed
    _require_unique([each.name for each in wanted])
    step = config.bucket_step
    shapes = bucket_sizes(resolution, step, config.max_aspect) if config.buckets else [resolution]

    def examine(candidate: _Candidate) -> Example | LeftOut:
        from lora_scripts.data.images import has_alpha, image_digest, image_size

        name, path, source = candidate.name, candidate.path, candidate.source
        mask = None
        try:
            size = image_size(path)
            digest = image_digest(path)
        except DataError as error:
            return LeftOut(name, unnamed(error, path), why="unreadable", folder=source.name)
        fit = fit_into(size, shapes)
        if not config.upscale and fit.upscales(size):
            reason = f"{size[0]}x{size[1]} is smaller than its shape {fit.bucket[0]}x{fit.bucket[1]}"
            return LeftOut(name, reason, folder=source.name)
        try:
            if candidate.mask is not None:
                mask = open_mask(candidate.mask)
            elif config.masked_loss == "alpha" and not source.regularization and has_alpha(path):
                mask = Mask("alpha", path, digest, size)
        except DataError as error:
            return LeftOut(name, f"its mask cannot be used: {error}", why="mask", folder=source.name)
        caption, *more = (with_trigger(text, source.trigger_word) for text in (candidate.caption, *candidate.more))
        return Example(
            name,
            path,
            size,
            fit,
            caption,
            candidate.repeats,
            digest,
            source.name,
            source.weight,
            source.regularization,
            tuple(more),
            mask,
        )

    with ThreadPoolExecutor(max_workers=4) as pool:
        examined = list(pool.map(examine, wanted))
    examples = [item for item in examined if isinstance(item, Example)]
    left_out += [item for item in examined if isinstance(item, LeftOut)]
    written = {each.name: each.caption for each in wanted}
    dataset = Dataset(examples, left_out, notes, written, sources, unused_masks)
    _require_examples(dataset)
    _require_batch(config, dataset)
    return dataset


def _list_folder(
    source: PictureSource,
    sources: Sequence[PictureSource],
    config: RunConfig,
    left_out: list[LeftOut],
    notes: list[str],
) -> list[_Candidate]:
    """A folder's pictures; adds those that cannot be used for want of a caption or a name, and what was noticed."""
    from lora_scripts.data.metadata import read_captions

    masks = [other.mask_dir for other in sources if other.mask_dir is not None]
    inside = folders_inside(source.path, [*(other.path for other in sources), *masks])
    table = read_captions(source.path, source.metadata_path, without=inside, per_line=config.caption_per_line)
    # A picture without a caption trains without one where there are no captions at all; a table leaves out what it lacks.
    unusable: dict[str, tuple[str, Why]] = {}
    for problem in table.problems:
        if problem.kind == "bad name":
            unusable[problem.name] = (problem.reason, "unreadable")
        elif problem.kind == "no caption" and table.source is not None and not source.caption:
            unusable[problem.name] = (problem.reason, "no caption")
    wanted = []
    for name in table.pictures:
        full = f"{source.prefix}{name}"
        if any(fnmatch.fnmatchcase(full, pattern) for pattern in config.exclude):
            left_out.append(LeftOut(_shown(full), "named in exclude", why="excluded", folder=source.name))
        elif name in unusable:
            reason, why = unusable[name]
            left_out.append(LeftOut(_shown(full), reason, why=why, folder=source.name))
        else:
            caption = table.captions.get(name) or source.caption
            repeats = source.repeats * table.repeats.get(name, 1)
            wanted.append(_Candidate(full, source.path / name, caption, table.more.get(name, ()), repeats, source))
    said = f"{source.name}: " if len(sources) > 1 else ""
    notes += [f"{said}{note}" for note in (*table.notes, *_useless_rows(table))]
    return wanted


def _with_masks(wanted: Sequence[_Candidate], source: PictureSource, unused: list[str]) -> list[_Candidate]:
    """A folder's pictures with their masks; adds the names of masks that belong to none. Regularization has no masks."""
    if source.regularization:
        return list(wanted)
    masks = MaskFolder(source.path, source.mask_dir)
    masked = [replace(each, mask=masks.find(each.name.removeprefix(source.prefix))) for each in wanted]
    unused += [f"{source.prefix}{path.name}" for path in masks.unused]
    return masked


def _require_unique(names: Sequence[str]) -> None:
    """Raises DataError when two pictures would be called the same."""
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise DataError(
            f"folders: two pictures would be called {twice}: a folder in train_data_dir has the name of an entry. "
            "Give the entry another name: {path: ..., name: ...}."
        )


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


def _require_batch(config: RunConfig, dataset: Dataset) -> None:
    """Raises ConfigError when the user wrote a batch that the data set can never fill; the default adapts in silence."""
    uses = total_uses(dataset.examples)
    if "batch_size" in config.model_fields_set and config.batch_size != "auto" and config.batch_size > uses:
        raise ConfigError(
            f"batch_size: {config.batch_size} is more than the {uses} pictures of an epoch, so it is never filled. "
            f"Set batch_size: {uses} or less, or add pictures."
        )


def _require_examples(dataset: Dataset) -> None:
    """Raises DataError, with the reasons, when nothing is left to train on, in all or in one of the folders."""
    some = {example.folder for example in dataset.examples}
    faults = [line for source in dataset.sources if source.name not in some for line in _why_empty(dataset, source)]
    if faults:
        raise DataError("\n".join(faults))


def _why_empty(dataset: Dataset, source: PictureSource) -> Iterator[str]:
    where = f"{source.path}" if len(dataset.sources) == 1 else f"{source.where}: {source.path}"
    lost = [item for item in dataset.left_out if item.folder == source.name]
    if not lost:
        yield f"{where}: holds no pictures (jpg, png, webp, bmp, gif, tiff). Put them there, or correct the path."
        return
    yield f"{where}: none of its {len(lost)} pictures can be trained on:"
    yield from (f"  {item.name}: {item.reason}" for item in lost[:20])
