"""The labelling engine: captions for the pictures of a folder that have none, in a table that survives anything.

Walking the folder, decoding in threads, batches, bad files, saving, resuming and the user's own words are dealt with here,
once, for every captioner.
"""

from __future__ import annotations

import fnmatch
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_scripts.captioners.part_sheet import PartSheet, has_parts, take_in_parts
from lora_scripts.captioners.protocol import Candidates, CaptionerSettings
from lora_scripts.captioners.rules import Rules
from lora_scripts.captioners.sheet import Sheet
from lora_scripts.captioners.side_file import LabelRecord, text_digest
from lora_scripts.errors import ConfigError, DataError
from lora_scripts.processes import ONE, Processes

if TYPE_CHECKING:
    from lora_scripts.captioners.batching import BatchSize, Picture
    from lora_scripts.captioners.protocol import Captioner

__all__ = [
    "Failure",
    "LabelJob",
    "LabelOptions",
    "LabelResult",
    "Listener",
    "caption_all",
    "doubtful",
    "label",
    "preview",
    "reapply_rules",
]

NUM_PREVIEWED = 5
NUM_NAMED = 3


@dataclass(frozen=True)
class LabelOptions:
    """One labelling run.

    Attributes:
        folder: the pictures.
        output: the table that is written.
        captioner: name in the table of captioners.
        model: folder, hub id or built-in name; None for the best one on this machine.
        precision: "auto", "fp32", "fp16" or "bf16".
        batch_size: None lets a short trial decide.
        num_workers: threads that decode pictures; None for as many as there are processors, at most 8.
        overwrite: write machine captions anew. Those of people stay in any case.
        exclude: names or patterns of pictures to leave out.
    """

    folder: Path
    output: Path
    captioner: str = "blip"
    model: str | None = None
    settings: CaptionerSettings = field(default_factory=CaptionerSettings)
    rules: Rules = field(default_factory=Rules)
    device: str = "auto"
    precision: str = "auto"
    batch_size: int | None = None
    num_workers: int | None = None
    overwrite: bool = False
    exclude: Sequence[str] = ()
    spreadsheet_safe: bool = False


class Listener(Protocol):
    """Who is told how a run goes."""

    def note(self, text: str) -> None: ...

    def start(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


@dataclass(frozen=True)
class Failure:
    """A picture that got no caption, and why."""

    name: str
    reason: str


@dataclass
class LabelResult:
    """What a run did.

    Attributes:
        num_pictures: all pictures of the folder that are not excluded.
        num_kept: captions that were there before and stay, `num_human` of them written or changed by a person.
        num_copies: captions taken over from a picture with the same content.
        seconds: time spent on captioning, loading of models not counted.
    """

    num_pictures: int = 0
    num_kept: int = 0
    num_human: int = 0
    num_written: int = 0
    num_copies: int = 0
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    def add(self, others: Sequence[LabelResult]) -> None:
        """Takes in what other processes did with their shares of the same pictures."""
        for other in others:
            self.num_written += other.num_written
            self.num_copies += other.num_copies
            self.failures += [failure for failure in other.failures if failure not in self.failures]
            self.interrupted |= other.interrupted
            self.seconds = max(self.seconds, other.seconds)


class LabelJob:
    """A run that is prepared: which pictures need a caption is known, no model is loaded."""

    def __init__(self, options: LabelOptions, listener: Listener, processes: Processes = ONE) -> None:
        if options.output.suffix.lower() != ".csv":
            raise DataError(f"{options.output}: captions are written as CSV. Name a file that ends in .csv.")
        self.options, self.listener = options, listener
        kind = Sheet if processes.is_first else PartSheet
        self.sheet = kind(options.folder, options.output, listener.note, spreadsheet_safe=options.spreadsheet_safe)
        if isinstance(self.sheet, PartSheet):
            self.sheet.journal(processes.index)
        table = self.sheet.table
        for text in table.notes:
            listener.note(text)
        pictures = [name for name in table.pictures if not _excluded(name, options.exclude)]
        if not pictures:
            left = f" ({len(table.pictures)} are left out by --exclude)" if table.pictures else ""
            raise DataError(
                f"{options.folder}: no pictures in it{left}. Files are looked for in all its subfolders, by their endings: "
                "jpg, png, webp, bmp, gif, tiff, avif."
            )
        self.result = LabelResult(num_pictures=len(pictures))
        self.missing: list[str] = []
        for problem in table.problems:
            if problem.kind == "bad name" and problem.name in pictures:
                self.result.failures.append(Failure(problem.name, problem.reason))
        self._note_problems()
        unwritable = {failure.name for failure in self.result.failures}
        for name in pictures:
            human = self.sheet.is_human(name)
            if name in unwritable:
                continue
            if name not in self.sheet.captions or (options.overwrite and not human):
                self.missing.append(name)
            else:
                self.result.num_kept += 1
                self.result.num_human += human
        self._note_replaced(pictures)

    def _note_problems(self) -> None:
        """Tell about rows of the table that give no caption, some of each kind."""
        for kind in ("no picture", "ambiguous name", "refused name", "bad row", "bad sidecar"):
            found = [problem for problem in self.sheet.table.problems if problem.kind == kind]
            for problem in found[:NUM_NAMED]:
                self.listener.note(f"No use for {problem.name!r} ({problem.reason}).")
            if len(found) > NUM_NAMED:
                self.listener.note(f"... and {len(found) - NUM_NAMED} more rows of that kind. They stay in the table.")

    def _note_replaced(self, pictures: Sequence[str]) -> None:
        """Tell about machine captions whose picture is another one now."""
        replaced = []
        todo = set(self.missing)
        for name in pictures:
            record = self.sheet.side.records.get(name)
            if record is None or name in todo or not record.image_bytes or self.sheet.is_human(name):
                continue
            try:
                if (self.options.folder / name).stat().st_size != record.image_bytes:
                    replaced.append(name)
            except OSError:
                continue
        if replaced:
            more = f" and {len(replaced) - 3} more" if len(replaced) > 3 else ""
            self.listener.note(
                f"Replaced since their captions were written: {', '.join(replaced[:3])}{more}. Delete their rows to get new captions."
            )

    def drop_unreadable(self) -> None:
        """Take out pictures that cannot be read up to the first one that can: for damaged ones alone no model is loaded."""
        from lora_scripts.data.images import read_image

        while self.missing:
            path = self.options.folder / self.missing[0]
            try:
                read_image(path, at_least=256)
            except DataError as error:
                self.result.failures.append(Failure(self.missing.pop(0), str(error).removeprefix(f"{path}: ")))
            else:
                return

    def load_captioner(self) -> tuple[Captioner, Any]:
        """The captioner and its device; tells which models are in use."""
        from lora_scripts.captioners import captioner_class

        loads = captioner_class(self.options.captioner)
        import torch

        from lora_scripts.allocator import keep_freed_memory
        from lora_scripts.devices import choose_device, describe_device

        device = choose_device(self.options.device)
        if device.type == "cpu":
            keep_freed_memory()
        formats = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "auto": None}
        if self.options.precision == "fp16" and device.type == "cpu":
            raise ConfigError("--precision fp16: is not made for CPUs. Use bf16, fp32 or auto.")
        captioner = loads.load(self.options.model, device, formats[self.options.precision], self.options.settings)
        for text in captioner.notes:
            self.listener.note(text)
        self.listener.note(f"Device: {describe_device(device)}")
        return captioner, device

    def record(self, name: str, picture: Picture, candidates: Candidates, models: dict[str, str]) -> LabelRecord:
        """What goes into the side file for one picture."""
        from lora_scripts.captioners.doubt import assess

        doubt, reasons = assess(candidates)
        second = len(candidates.texts) > 1
        settings = self.options.settings
        return LabelRecord(
            filename=name,
            text=self.options.rules.apply(candidates.texts[0]),
            caption=candidates.texts[0],
            score=round(candidates.scores[0], 4),
            runner_up=candidates.texts[1] if second else "",
            runner_up_score=round(candidates.scores[1], 4) if second else None,
            likelihood=round(candidates.likelihoods[0], 4),
            doubt=round(doubt, 4),
            reasons=reasons,
            image_sha256=picture.digest,
            image_bytes=picture.num_bytes,
            models=models,
            settings={
                "captioner": self.options.captioner,
                "decoding": settings.decoding,
                "prompt": settings.prompt,
                "seed": settings.seed,
            },
        )


def label(options: LabelOptions, listener: Listener, processes: Processes = ONE) -> LabelResult:
    """Captions for all pictures that have none; the result tells what was done and what failed.

    An interruption (Ctrl-C) ends the run early with everything saved and `interrupted` set. On several processes each captions
    its share, and the first writes the table and has the result of all.

    Raises:
        DataError: there are no pictures, or the table cannot be read or written.
        ModelError: the captioner cannot be used.
        LostProcessError: another process has ended; what was captioned is saved.
    """
    with processes.first_goes_ahead():
        if processes.is_first and has_parts(options.output):
            _take_over(options, listener)
        job = LabelJob(options, listener, processes)
        result, sheet = job.result, job.sheet
        if sheet.num_recovered:
            listener.note(f"{sheet.num_recovered} captions of a run that was broken off were recovered.")
        if job.missing and processes.is_first:
            _check_writable(options.output)
    missing = processes.from_first(lambda: job.missing)
    job.missing = list(processes.share(missing))
    job.drop_unreadable()
    began = time.monotonic()
    try:
        if job.missing:
            captioner, device = job.load_captioner()
            began = time.monotonic()
            caption_all(job, captioner, device.type)
    except KeyboardInterrupt:
        result.interrupted = True
        if not options.overwrite:  # the interruption may have come between counting a batch and keeping it
            result.num_written = sum(name in sheet.captions for name in job.missing)
    finally:
        result.seconds = time.monotonic() - began if job.missing else 0.0
        try:
            result.add(processes.gather(result)[1:])
        finally:
            if processes.count > 1 and processes.is_first:
                take_in_parts(sheet)
            sheet.finish(backup=options.overwrite and bool(missing))
    order = {name: index for index, name in enumerate(sheet.table.pictures)}
    result.failures.sort(key=lambda failure: order[failure.name])
    return result


def _take_over(options: LabelOptions, listener: Listener) -> None:
    """Puts what processes of a run that was broken off had captioned into the table."""
    sheet = Sheet(options.folder, options.output, listener.note, spreadsheet_safe=options.spreadsheet_safe)
    taken = take_in_parts(sheet)
    pictures = "picture" if taken == 1 else "pictures"
    listener.note(f"Recovered from processes that were broken off: captions of {taken} {pictures}.")
    sheet.finish()


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a picture's name, with or without its folder, is among the patterns."""
    return any(fnmatch.fnmatchcase(part, pattern) for pattern in patterns for part in (name, name.rsplit("/", 1)[-1]))


def caption_all(job: LabelJob, captioner: Captioner, device: str) -> None:
    """Caption the job's missing pictures; rows are saved now and then, not at the end."""
    from lora_scripts.captioners.batching import BatchSize, Loader

    options, listener = job.options, job.listener
    size = BatchSize(options.batch_size, device)
    num_workers = options.num_workers or min(8, os.cpu_count() or 1)
    done: dict[str, Candidates] = {}
    broken: dict[str, str] = {}
    copies: dict[str, list[Picture]] = defaultdict(list)
    batch: list[Picture] = []
    models = captioner.models
    listener.start(len(job.missing))

    def settle(picture: Picture, *, copy: bool = False) -> LabelRecord | None:
        candidates = done[picture.digest]
        listener.advance(1)
        if not candidates.texts[0]:
            job.result.failures.append(
                Failure(picture.name, "the model found no words for it. Write its caption by hand.")
            )
            return None
        job.result.num_written += 1
        job.result.num_copies += copy
        return job.record(picture.name, picture, candidates, models)

    def run_batch() -> None:
        for picture, candidates in zip(batch, _caption(captioner, batch, size), strict=True):
            done[picture.digest] = candidates
        records = [settle(picture) for picture in batch]
        records += [settle(copy, copy=True) for picture in batch for copy in copies.pop(picture.digest, [])]
        batch.clear()
        job.sheet.put([record for record in records if record is not None])

    with Loader(
        options.folder,
        job.missing,
        captioner.prepare,
        at_least=2 * captioner.image_side,
        num_workers=num_workers,
        ahead=lambda: 2 * size.value + num_workers,
    ) as loader:
        for picture in loader:
            if picture.fault:
                broken[picture.digest] = picture.fault
                job.result.failures.append(Failure(picture.name, picture.fault))
                listener.advance(1)
            elif picture.prepared is not None:
                batch.append(picture)
                if len(batch) >= size.value:
                    run_batch()
            elif picture.digest in done:
                record = settle(picture, copy=True)
                job.sheet.put([record] if record else [])
            else:
                copies[picture.digest].append(picture)
        if batch:
            run_batch()
    for digest, pictures in copies.items():  # the first of these copies could not be decoded, so neither can the others
        for picture in pictures:
            job.result.failures.append(Failure(picture.name, broken.get(digest, "is a copy of a damaged picture.")))
            listener.advance(1)


def _caption(captioner: Captioner, batch: Sequence[Picture], size: BatchSize) -> list[Candidates]:
    """Candidates for a batch; when memory runs out, in smaller and smaller parts."""
    from lora_scripts.captioners.batching import is_out_of_memory

    results: list[Candidates] = []
    while len(results) < len(batch):
        part = batch[len(results) : len(results) + size.value]
        began = time.monotonic()
        try:
            results += captioner.caption([picture.prepared for picture in part], [picture.digest for picture in part])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds the tensors of the failed attempt
            _free_memory()
            size.out_of_memory()
            continue
        size.record(len(part), time.monotonic() - began)
    return results


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_writable(output: Path) -> None:
    """Raise before minutes of work are spent on captions that could not be saved."""
    folder = next((parent for parent in output.absolute().parents if parent.exists()), output.absolute().parent)
    if output.is_symlink():
        raise DataError(f"{output}: is a symbolic link, which is never written through. Name the file it points at.")
    if not os.access(folder, os.W_OK) or (output.exists() and not os.access(output, os.W_OK)):
        raise DataError(f"{output}: cannot be written (no permission). Choose another place with --output.")


def reapply_rules(options: LabelOptions, listener: Listener, *, dry_run: bool = False) -> list[tuple[str, str, str]]:
    """(name, before, after) for each machine caption that the rules now make something else of; saved unless `dry_run`.

    The rules start from the model's own words in the side file. Captions of people are not touched.
    """
    job = LabelJob(options, listener)
    sheet, changes, records = job.sheet, [], []
    for name, before in sheet.captions.items():
        record = sheet.side.records.get(name)
        if record is None or sheet.is_human(name) or _excluded(name, options.exclude):
            continue
        after = options.rules.apply(record.caption)
        if after and text_digest(after) != text_digest(before):
            changes.append((name, before, after))
            records.append(LabelRecord(**{**vars(record), "text": after}))
    if not dry_run and records:
        _check_writable(options.output)
        sheet.put(records)
        sheet.finish(backup=True)
    return changes


def preview(
    options: LabelOptions, listener: Listener, count: int = NUM_PREVIEWED
) -> tuple[int, list[tuple[str, str, str]]]:
    """How many pictures would be captioned, and (name, model's words, prompt) for the first few; nothing is written."""
    from lora_scripts.captioners.batching import Loader

    job = LabelJob(options, listener)
    if not job.missing:
        return 0, []
    captioner, _ = job.load_captioner()
    shown: list[tuple[str, str, str]] = []
    with Loader(
        options.folder, job.missing[: 4 * count], captioner.prepare, at_least=2 * captioner.image_side, num_workers=2,
        ahead=lambda: 2,
    ) as loader:  # fmt: skip
        for picture in loader:
            if picture.prepared is not None and len(shown) < count:
                words = captioner.caption([picture.prepared], [picture.digest])[0].texts[0]
                shown.append((picture.name, words, options.rules.apply(words)))
    return len(job.missing), shown


def doubtful(options: LabelOptions, listener: Listener, count: int) -> list[tuple[LabelRecord, str]]:
    """The machine captions that a look pays most for, with their text in the table; captions of people are not among them."""
    sheet = Sheet(options.folder, options.output, listener.note)
    rows = [
        (record, sheet.captions[name])
        for name, record in sheet.side.records.items()
        if name in sheet.captions and not sheet.is_human(name)
    ]
    return sorted(rows, key=lambda row: -row[0].doubt)[:count]
