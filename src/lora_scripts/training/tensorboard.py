"""Curves, previews and texts for TensorBoard.

Events are built by torch's own helpers and written through the same append-only file as the other logs: torch's
`SummaryWriter` writes from a thread of its own, which dies with a traceback on a full disk and loses what is queued
when the process is killed.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.training.events import Answers, Listener, Preview, RunStart, StepReport, Validation
from lora_scripts.training.log_file import AppendFile, one_line
from lora_scripts.words import PICTURES, Words, words_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.training.throughput import Throughput

__all__ = ["TensorBoardListener"]

_MAX_CAPTIONS = 100
_FILE_NUMBER = itertools.count()


class TensorBoardListener(Listener):
    """Writes one event file per start into `log_dir`; a resumed run's curves join the older ones.

    Tags: loss/train (every step), loss/smoothed, lr/<group>, grad_norm, speed/images_per_s (or trained_tokens_per_s),
    speed/waiting, speed/padding and speed/of_peak (shares), memory/current_gib and memory/peak_gib; validation/held_out, validation/training, validation/gap; preview/<n> pictures with their prompts as
    texts; answers, a table of base model and LoRA as text, answers/ended and answers/repeated; config, run and captions as texts. The page "custom scalars" shows the validation losses and their gap in one chart.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._file: _EventFile | None = None
        self._shown_prompts: dict[int, str] = {}
        self._words = PICTURES

    def started(self, run: RunStart) -> None:
        step = run.first_step
        self._words = words_of(str(run.settings.get("task_type")), str(run.settings.get("objective", "sft")))
        texts = [
            *_text("config", _yaml(run), step),
            *_text("run", _table(("what", "value"), run.facts), step),
            *_text("captions", _captions(run.captions, self._words), step),
            _layout(self._words),
        ]
        # A pass over step N starts anew at N + 1: step N itself belongs to the older part.
        self._add(texts, first_new=step + 1 if step else 0)

    def stepped(self, report: StepReport) -> None:
        first = report.step - len(report.losses) + 1
        gib = 2**30
        scalars = {
            "loss/smoothed": report.loss_smoothed,
            **{f"lr/{_tag(group)}": rate for group, rate in report.learning_rates.items()},
            "grad_norm": report.grad_norm,
            f"speed/{self._words.rate_tag}": report.rate,
            "memory/current_gib": report.memory.current_bytes / gib,
            "memory/peak_gib": report.memory.peak_bytes / gib,
            **_shares(report.throughput),
        }
        self._add(
            [
                *(_scalar("loss/train", loss, first + i) for i, loss in enumerate(report.losses)),
                *(_scalar(tag, value, report.step) for tag, value in scalars.items()),
            ],
            first_new=first,
        )

    def validated(self, validation: Validation) -> None:
        scalars = {
            "validation/held_out": validation.loss,
            "validation/training": validation.training_loss,
            "validation/gap": validation.gap,
        }
        self._add((_scalar(tag, value, validation.step) for tag, value in scalars.items()), validation.step)

    def previewed(self, preview: Preview) -> None:
        events: list[Any] = []
        for number, (prompt, image) in enumerate(zip(preview.prompts, preview.images, strict=True), 1):
            events.append(_image(f"preview/{number}", image, preview.step))
            if self._shown_prompts.get(number) != prompt:
                self._shown_prompts[number] = prompt
                events += _text(f"preview/{number}", _plain(prompt), preview.step)
        self._add(events, first_new=preview.step)

    def answered(self, answers: Answers) -> None:
        from lora_scripts.answering.alarms import share_repeated

        said = list(zip(answers.prompts, answers.base, answers.adapter, strict=True))
        if not said:
            return
        table = _table(
            ("prompt", "base model", "LoRA"), [(prompt, base.text, lora.text) for prompt, base, lora in said]
        )
        scalars = {
            "answers/ended": sum(lora.ended for _, _, lora in said) / len(said),
            "answers/repeated": sum(share_repeated(lora.text) for _, _, lora in said) / len(said),
        }
        events = [_scalar(tag, value, answers.step) for tag, value in scalars.items()]
        remarks = "\n\n".join(map(_plain, answers.alarms))
        self._add(_text("answers", f"{table}\n\n{remarks}", answers.step) + events, first_new=answers.step)

    def rewound(self, step: int, reason: str) -> None:
        self.close()  # a new file says that what the old one holds of later steps is superseded
        self._file = _EventFile(self._log_dir, step + 1)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, events: Iterable[Any], first_new: int) -> None:
        # Whatever comes first opens the file: previews of the untrained model may be rendered before the start.
        if self._file is None:
            self._file = _EventFile(self._log_dir, first_new)
        self._file.add(events)


class _EventFile:
    """A new event file in `log_dir`; what older files hold of step `first_new` and later is marked as superseded."""

    def __init__(self, log_dir: Path, first_new: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # Readers take the files in the order of their names. The clock may have been set back since the older ones.
        started = [
            int(number[1]) + 1
            for path in log_dir.glob("events.out.tfevents.*")
            if (number := re.match(r"events\.out\.tfevents\.(\d{10})\.", path.name))
        ]
        name = f"events.out.tfevents.{max([int(time.time()), *started]):010}.{os.getpid()}.{next(_FILE_NUMBER)}"
        self._file = AppendFile(log_dir / name)
        self.add(
            [
                Event(file_version="brain.Event:2"),
                Event(step=first_new, session_log=SessionLog(status=SessionLog.START)),
            ]
        )

    def add(self, events: Iterable[Any]) -> None:
        """Append the events as TFRecords, in one piece."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = _Buffer()
        writer = RecordWriter(buffer)
        now = time.time()
        for event in events:
            event.wall_time = now
            writer.write(event.SerializeToString())
        if buffer.data:
            self._file.write(bytes(buffer.data))

    def close(self) -> None:
        self._file.close()


class _Buffer:
    """The part of a binary file that a record writer uses."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


def _scalar(tag: str, value: float, step: int) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard.summary import scalar

    return Event(step=step, summary=scalar(tag, value))  # type: ignore[no-untyped-call]


def _layout(words: Words) -> Any:
    """What the page "custom scalars" shows: curves that say something only side by side, each group in one chart."""
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard.summary import custom_scalars

    validation = ["validation/training", "validation/held_out", "validation/gap"]
    charts = {
        f"memorisation: training {words.examples}, held-out {words.examples}, gap": ["Multiline", validation],
        "loss of training steps": ["Multiline", ["loss/train", "loss/smoothed"]],
    }
    return Event(summary=custom_scalars({"overview": charts}))  # type: ignore[no-untyped-call]


def _image(tag: str, image: Image, step: int) -> Any:
    import numpy as np
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard.summary import image as image_summary

    pixels = np.asarray(image.convert("RGB"))
    return Event(step=step, summary=image_summary(tag, pixels, dataformats="HWC"))  # type: ignore[no-untyped-call]


def _text(tag: str, markdown: str, step: int) -> list[Any]:
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard.summary import text

    if not markdown:
        return []
    # protobuf strings must be valid UTF-8, which undecodable file names are not.
    clean = markdown.encode("utf-8", errors="replace").decode("utf-8")
    return [Event(step=step, summary=text(tag, clean))]  # type: ignore[no-untyped-call]


def _shares(found: Throughput | None) -> dict[str, float]:
    if found is None:
        return {}
    shares = {"waiting": found.waiting, "padding": found.padding, "of_peak": found.peak_share}
    return {f"speed/{name}": share for name, share in shares.items() if share is not None}


def _tag(name: str) -> str:
    return re.sub(r"[^-\w./]+", "_", name) or "0"


def _yaml(run: RunStart) -> str:
    """The settings as a code block."""
    import yaml

    settings = {key: _plain_value(value) for key, value in run.settings.items()}
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False, default_flow_style=False, width=1000)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 3)
    return f"{fence}yaml\n{text}{fence}"


def _plain_value(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain_value(part) for part in value]
    return str(value)


def _captions(captions: Sequence[tuple[str, str]], words: Words) -> str:
    shown = [(str(i), *pair) for i, pair in enumerate(captions[:_MAX_CAPTIONS], 1)]
    table = _table(("#", words.example, words.says), shown)
    more = len(captions) - len(shown)
    return f"{table}\n\n{more} more are not shown." if more > 0 else table


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or nothing when there are no rows."""
    lines = [" | ".join(_plain(cell) for cell in row) for row in rows]
    if not lines:
        return ""
    return "\n".join([" | ".join(header), " | ".join("---" for _ in header), *lines])


def _plain(text: str) -> str:
    """The text on one line, with everything escaped that Markdown or HTML would act on."""
    return re.sub(r"[\\`*_{}\[\]#|<>~&]", lambda mark: f"&#{ord(mark[0])};", one_line(text))
