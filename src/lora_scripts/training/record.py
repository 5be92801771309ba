"""What happened in a run, kept so that the report can be written later, also of a run that was killed or resumed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_scripts.dialogues.answers import Answer
from lora_scripts.training.events import Answers, Level, Listener, Preview, RunStart, StepReport, Validation
from lora_scripts.training.log_file import AppendFile
from lora_scripts.training.memory import MemoryReading

__all__ = [
    "Note",
    "PreviewFiles",
    "RunHistory",
    "RunRecord",
    "SampleFiles",
    "read_record",
    "sample_infotext",
    "sample_name",
]

_MAX_CAPTIONS = 100
"""Captions kept in the record; the data set itself holds them all."""


def sample_name(step: int, number: int) -> str:
    """`step-000100-1.png`; `number` counts the prompts from 1."""
    return f"step-{step:06}-{number}.png"


class RunRecord(Listener):
    """Appends one JSON object per event to `path`; `read_record` makes a `RunHistory` of it."""

    def __init__(self, path: Path, samples: str = "samples") -> None:
        """Args:
        path: usually `output_dir/record.jsonl`.
        samples: the folder beside it where `SampleFiles` keeps the previews.
        """
        self._file = AppendFile(path, mend=b"\n")
        self._samples = samples
        self._step: int | None = None
        self._began = time.monotonic()
        self._opened = False

    def note(self, text: str, level: Level = "info") -> None:
        self._write("note", step=self._step, level=level, text=text)

    def started(self, run: RunStart) -> None:
        self._began = time.monotonic()
        self._step = run.first_step
        self._write(
            "started",
            time=datetime.now().astimezone().isoformat(timespec="seconds"),
            first_step=run.first_step,
            max_steps=run.max_steps,
            settings=dict(run.settings),
            facts=[list(fact) for fact in run.facts],
            captions=[list(pair) for pair in run.captions[:_MAX_CAPTIONS]],
            num_captions=len(run.captions),
        )

    def ticked(self, step: int) -> None:
        self._step = step

    def stepped(self, report: StepReport) -> None:
        self._write(
            "stepped",
            step=report.step,
            max_steps=report.max_steps,
            epoch=report.epoch,
            losses=list(report.losses),
            loss_smoothed=report.loss_smoothed,
            learning_rates=dict(report.learning_rates),
            grad_norm=report.grad_norm,
            rate=report.rate,
            eta_s=report.eta_s,
            memory=[report.memory.current_bytes, report.memory.peak_bytes, report.memory.source],
        )

    def validated(self, validation: Validation) -> None:
        held_out, trained = list(validation.held_out), list(validation.trained)
        self._write("validated", step=validation.step, held_out=held_out, trained=trained)

    def previewed(self, preview: Preview) -> None:
        names = [f"{self._samples}/{sample_name(preview.step, i + 1)}" for i in range(len(preview.images))]
        self._write("previewed", step=preview.step, prompts=list(preview.prompts), files=names)

    def answered(self, answers: Answers) -> None:
        self._write("answered", **asdict(answers))

    def saved(self, step: int, folder: Path) -> None:
        self._write("saved", step=step, folder=folder.name)

    def rewound(self, step: int, reason: str) -> None:
        self._step = step
        self._write("rewound", step=step)

    def finished(self, files: Sequence[Path]) -> None:
        self._write("finished", step=self._step, files=[str(file) for file in files])

    def close(self) -> None:
        self._file.close()

    def _write(self, event: str, **fields: object) -> None:
        if not self._opened:
            self._opened = True
            self._write("opened")
        entry = {"event": event, "seconds": round(time.monotonic() - self._began, 3), **fields}
        # JSON has no NaN. Lone surrogates (undecodable file names) become \udcxx, which JSON reads back.
        line = json.dumps(_finite(entry), ensure_ascii=False, allow_nan=False, default=str)
        self._file.write(line.encode("utf-8", errors="backslashreplace") + b"\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


class SampleFiles(Listener):
    """Keeps every preview as `step-000100-1.png` in `folder`, with its prompt and settings in the text chunk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._settings: Mapping[str, object] = {}

    def started(self, run: RunStart) -> None:
        self._settings = run.settings

    def previewed(self, preview: Preview) -> None:
        from lora_scripts.sampling.infotext import save_png

        for i, (prompt, image) in enumerate(zip(preview.prompts, preview.images, strict=True)):
            infotext = sample_infotext(self._settings, prompt, i, image.size)
            save_png(image, self._folder / sample_name(preview.step, i + 1), infotext)


def sample_infotext(settings: Mapping[str, Any], prompt: str, index: int, size: tuple[int, int]) -> str:
    """The `index`-th prompt (from 0) with the settings of the run's previews, as the WebUI writes them."""
    from lora_scripts.config import RunConfig
    from lora_scripts.sampling.denoise import DEFAULT_SAMPLER
    from lora_scripts.sampling.infotext import format_infotext

    names = ("sample_negative_prompt", "sample_steps", "sample_guidance", "sample_seed", "clip_skip")
    known = {name: settings.get(name, RunConfig.model_fields[name].default) for name in names}
    return format_infotext(
        prompt,
        known["sample_negative_prompt"],
        steps=known["sample_steps"],
        sampler=DEFAULT_SAMPLER,
        guidance=known["sample_guidance"],
        seed=known["sample_seed"] + index,
        width=size[0],
        height=size[1],
        clip_skip=known["clip_skip"],
    )


@dataclass(frozen=True)
class Note:
    """A line for people; `step` is None for what was said before the first step."""

    step: int | None
    level: Level
    text: str


@dataclass(frozen=True)
class PreviewFiles:
    """Previews of one step: prompts and the files they lie in, in the same order."""

    step: int
    prompts: Sequence[str]
    files: Sequence[Path]


@dataclass
class RunHistory:
    """A run as its record tells it; what was superseded by a resumed run is left out.

    Attributes:
        steps, losses: one entry per step, of the same length.
        reports: the readings of every `log_steps` steps: rates, gradient norm, speed, memory, smoothed loss.
        validations: the validation losses, in order.
        previews, answers: by step, in order.
        checkpoints: (step, name of the folder), in order.
        files: the finished files; empty while the run is not finished.
        seconds: time the kept steps took, previews and saves included, over all parts of the run.
        started_at: local time of the first start, ISO 8601.
        num_parts: in how many parts the kept steps were taken; 1 for a run that was never resumed.
    """

    settings: dict[str, object] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    captions: list[tuple[str, str]] = field(default_factory=list)
    num_captions: int = 0
    max_steps: int = 0
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    previews: dict[int, PreviewFiles] = field(default_factory=dict)
    answers: dict[int, Answers] = field(default_factory=dict)
    checkpoints: list[tuple[int, str]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0
    started_at: str = ""
    num_parts: int = 0

    @property
    def last_step(self) -> int:
        return self.steps[-1] if self.steps else 0


def read_record(path: Path) -> RunHistory:
    """The run that `path` records; an empty history when there is no such file.

    A line that was cut by a kill is ignored. After a resume that went back to step N, what the earlier part did
    beyond N is left out.
    """
    history = RunHistory()
    if not path.is_file():
        return history
    part = _Parts(history, path.parent)
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line.decode("utf-8", errors="replace"))
            part.take(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # half a line, or bytes that a power cut left behind
    part.finish()
    return history


class _Parts:
    """Puts the parts of a run together, one entry at a time."""

    def __init__(self, history: RunHistory, folder: Path) -> None:
        self._history = history
        self._folder = folder
        self._losses: dict[int, float] = {}
        self._part_of: dict[int, int] = {}
        self._part = 0
        self._clock: list[list[tuple[int, float]]] = []
        self._early_notes: list[Note] = []
        self._pending_notes: list[Note] = []

    def take(self, entry: dict[str, Any]) -> None:
        history = self._history
        match entry["event"]:
            case "started":
                self._start(entry)
            case "stepped":
                report = _report(entry)
                first = report.step - len(report.losses) + 1
                self._losses.update({first + i: loss for i, loss in enumerate(report.losses)})
                self._part_of.update(dict.fromkeys(range(first, report.step + 1), self._part))
                history.reports.append(report)
                history.max_steps = report.max_steps
                self._tick(entry)
            case "validated":
                losses = [[_number(loss) for loss in entry[group]] for group in ("held_out", "trained")]
                history.validations.append(Validation(int(entry["step"]), *losses))
                self._tick(entry)
            case "previewed":
                files = [self._folder / name for name in entry["files"]]
                history.previews[int(entry["step"])] = PreviewFiles(int(entry["step"]), list(entry["prompts"]), files)
                self._tick(entry)
            case "answered":
                history.answers[int(entry["step"])] = _answers(entry)
                self._tick(entry)
            case "saved":
                history.checkpoints.append((int(entry["step"]), str(entry["folder"])))
                self._tick(entry)
            case "note":
                note = Note(entry["step"], "warning" if entry["level"] == "warning" else "info", str(entry["text"]))
                (self._pending_notes if note.step is None else history.notes).append(note)
            case "opened":
                # What a start said that came to nothing, such as a refusal, is no part of the run that came later.
                self._pending_notes = []
            case "rewound":
                self._forget_after(int(entry["step"]))
            case "finished":
                history.files = [Path(file) for file in entry["files"]]
                history.finished = True
                self._tick(entry)

    def finish(self) -> None:
        history = self._history
        history.steps = sorted(self._losses)
        history.losses = [self._losses[step] for step in history.steps]
        history.num_parts = len({self._part_of[step] for step in history.steps})
        history.previews = dict(sorted(history.previews.items()))
        history.answers = dict(sorted(history.answers.items()))
        history.seconds = sum(max((seconds for _, seconds in part), default=0.0) for part in self._clock)
        history.notes = (self._early_notes or self._pending_notes) + history.notes

    def _start(self, entry: dict[str, Any]) -> None:
        history, kept = self._history, int(entry["first_step"])
        # What is said before the first step is said again at every start; the last time counts.
        self._early_notes, self._pending_notes = self._pending_notes, []
        self._forget_after(kept)
        history.notes = [note for note in history.notes if note.step is None or note.step <= kept]
        self._clock = [[(step, seconds) for step, seconds in part if step <= kept] for part in self._clock]
        self._clock.append([])
        history.files, history.finished = [], False
        if kept == 0:
            # Nothing of an earlier part lives on in this run.
            history.notes, history.started_at = [], ""
            self._clock = [[]]
        history.settings = dict(entry["settings"])
        history.facts = [(str(what), str(value)) for what, value in entry["facts"]]
        history.captions = [(str(name), str(caption)) for name, caption in entry["captions"]]
        history.num_captions = int(entry["num_captions"])
        history.max_steps = int(entry["max_steps"])
        history.started_at = history.started_at or str(entry["time"])
        self._part += 1

    def _forget_after(self, kept: int) -> None:
        history = self._history
        self._losses = {step: loss for step, loss in self._losses.items() if step <= kept}
        history.reports = [report for report in history.reports if report.step <= kept]
        # The measurement of the step itself stands before the save, and is not made again.
        history.validations = [each for each in history.validations if each.step <= kept]
        history.previews = {step: files for step, files in history.previews.items() if step <= kept}
        history.answers = {step: answers for step, answers in history.answers.items() if step <= kept}
        history.checkpoints = [(step, folder) for step, folder in history.checkpoints if step <= kept]

    def _tick(self, entry: dict[str, Any]) -> None:
        if self._clock and entry["step"] is not None:
            self._clock[-1].append((int(entry["step"]), float(entry["seconds"])))


def _report(entry: dict[str, Any]) -> StepReport:
    current, peak, source = entry["memory"]
    return StepReport(
        step=int(entry["step"]),
        max_steps=int(entry["max_steps"]),
        epoch=_number(entry["epoch"]),
        losses=[_number(loss) for loss in entry["losses"]],
        loss_smoothed=_number(entry["loss_smoothed"]),
        learning_rates={str(group): _number(rate) for group, rate in entry["learning_rates"].items()},
        grad_norm=_number(entry["grad_norm"]),
        rate=_number(entry["rate"] if "rate" in entry else entry["examples_per_s"]),
        eta_s=_number(entry["eta_s"]),
        memory=MemoryReading(int(current), int(peak), source),
    )


def _answers(entry: dict[str, Any]) -> Answers:
    base, adapter = (
        [Answer(str(each["text"]), bool(each["ended"]), int(each["num_tokens"])) for each in entry[whose]]
        for whose in ("base", "adapter")
    )
    prompts, told, expected = (list(map(str, entry[what])) for what in ("prompts", "alarms", "expected"))
    return Answers(int(entry["step"]), prompts, base, adapter, told, expected)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
