"""Collects what the report tells: the run's record, its data set with small pictures, its files and proofs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.data.dataset import Dataset, Example
from lora_scripts.data.sampler import mean_uses
from lora_scripts.errors import DataError
from lora_scripts.models.recognise import read_json
from lora_scripts.report.facts import FolderRow, HardThumbnail, Measurement, ReportFacts, Thumbnail
from lora_scripts.report.usage import use_folder

if TYPE_CHECKING:
    from lora_scripts.pipeline import Outcome

__all__ = ["build_report"]

MOST_THUMBNAILS = 60
THUMBNAIL_PIXELS = 192


def build_report(config: RunConfig, outcome: Outcome, measurements: Sequence[Measurement] = ()) -> Path:
    """Writes `output_dir/report.html` anew from the run's record and returns its path."""
    from lora_scripts.report.page import write_report
    from lora_scripts.training.record import read_record

    path = config.output_dir / "report.html"
    facts = ReportFacts(
        name=config.name,
        words=config.words,
        num_examples=sum(not each.is_regularization for each in outcome.dataset.examples),
        left_out=[(item.name, item.reason) for item in outcome.dataset.left_out],
        measurements=measurements,
        check=outcome.check,
        chosen_step=outcome.choice.step if outcome.choice else None,
        chosen_why=outcome.choice.why if outcome.choice else "",
        step_scores=outcome.choice.scores if outcome.choice else (),
        files=outcome.files,
        verification=outcome.proofs,
        advice=[line.removeprefix("Advice: ") for line in outcome.advice],
        written_settings={*config.model_fields_set, "memory"},  # what auto chose is told beside what was written
    )
    facts = OF_TASK[config.task_type](facts, config, outcome)
    write_report(path, read_record(config.output_dir / "record.jsonl"), facts)
    return path


def _of_pictures(facts: ReportFacts, config: RunConfig, outcome: Outcome) -> ReportFacts:
    dataset = outcome.dataset
    assert isinstance(dataset, Dataset)
    trigger = f"{config.triggers[0]}, " if config.triggers else ""
    return replace(
        facts,
        trigger=", ".join(config.triggers),
        folders=_folders(dataset),
        thumbnails=_thumbnails(dataset),
        bucket_counts={f"{width}x{height}": count for (width, height), count in dataset.bucket_counts.items()},
        worst_fitted=[
            HardThumbnail(small, each.loss, each.hint)
            for each in outcome.hard_examples
            if (small := _thumbnail(each.example)) is not None
        ],
        next_commands=[
            (
                "render pictures with it",
                f'lora-scripts sample --base-model {config.base_model} --prompt "{trigger}... <lora:{config.name}:0.8>" '
                f"--lora-dir {config.output_dir} --output pictures",
            ),
            _curves_command(config),
        ],
    )


def _of_dialogues(facts: ReportFacts, config: RunConfig, outcome: Outcome) -> ReportFacts:
    folder = outcome.files[0]
    rank = read_json(folder / "adapter_config.json", folder.name)["r"]
    base = f"--base-model {config.base_model} --lora {folder}"
    return replace(
        facts,
        use=use_folder(config.name, config.base_model, folder, rank, config.system_prompt or ""),
        worst_fitted_texts=[
            (each.example.name, each.example.caption, f"{each.loss}. {each.hint}") for each in outcome.hard_examples
        ],
        next_commands=[
            ("talk with it, beside the base model", f"lora-scripts chat {base} --side-by-side"),
            ("write it for another program", f"lora-scripts export --for vllm {base} --output {folder}-vllm"),
            ("make one model of both", f"lora-scripts merge {base} --output {folder}-merged"),
            _curves_command(config),
        ],
    )


OF_TASK = {"text-to-image": _of_pictures, "text-generation": _of_dialogues}
"""Task -> what its report tells beside what all reports tell."""


def _curves_command(config: RunConfig) -> tuple[str, str]:
    return "look at the curves", f"tensorboard --logdir {config.output_dir / 'logs'} --port 6006"


def _folders(dataset: Dataset) -> list[FolderRow]:
    """What came from where; nothing to tell of a single folder."""
    uses = dict(zip((each.name for each in dataset.examples), mean_uses(dataset.examples), strict=True))
    rows = [
        FolderRow(
            source.name,
            len(examples),
            sum(uses[each.name] for each in examples),
            source.trigger_word or "",
            source.weight,
            source.regularization,
        )
        for source, examples in dataset.by_folder()
    ]
    return rows if len(rows) > 1 else []


def _thumbnails(dataset: Dataset) -> list[Thumbnail]:
    """The first pictures of the data set."""
    found = (_thumbnail(example) for example in dataset.learnt[:MOST_THUMBNAILS])
    return [small for small in found if small is not None]


def _thumbnail(example: Example) -> Thumbnail | None:
    """A picture as it trains, fitted to its shape, then made small; None when it was removed or damaged since."""
    from lora_scripts.data.buckets import fit_image
    from lora_scripts.data.images import read_image

    try:
        image = fit_image(read_image(example.path), example.fit)
    except DataError:
        return None
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    more = f" (and {len(example.more_captions)} more captions)" if example.more_captions else ""
    return Thumbnail(image, example.name, example.caption + more)
