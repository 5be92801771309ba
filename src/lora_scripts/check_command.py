"""`check`: what is wrong with a data set and what a run on it will take, before a night is spent on it."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig
    from lora_scripts.preflight.findings import Report

__all__ = ["add_arguments", "run"]

BARE_RESOLUTION = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the check command; either --config or --input has to be given."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="the run's settings: checks data, step, memory, time and disk")
    what.add_argument("--input", type=Path, metavar="DIR", help="a folder of pictures alone: checks data only")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the config"
    )
    parser.add_argument("--resolution", help=f"training size to check --input for (default: {BARE_RESOLUTION})")
    parser.add_argument("--no-model", action="store_true", help="do not run a training step: no time and memory")
    parser.add_argument("--json", action="store_true", help="write the report as JSON (docs/checks.md)")
    parser.add_argument("--force", action="store_true", help="exit with 0 also when something is red")


def run(arguments: argparse.Namespace) -> int:
    """Checks and reports; the exit code: 0, or 2 when something red was found.

    Raises:
        LoraScriptsError: settings or the base model cannot be used, so there is nothing to check.
    """
    report = _check_folder(arguments) if arguments.input is not None else _check_config(arguments)
    if arguments.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=1))
    else:
        from lora_scripts.preflight.terminal import show_report

        show_report(report)
    return report.exit_code(arguments.force)


def _check_config(arguments: argparse.Namespace) -> Report:
    from lora_scripts.config_file import load_config

    if arguments.resolution is not None:
        raise ConfigError("--resolution: goes with --input; with --config write --set resolution=...")
    config, advice = load_config(arguments.config, arguments.set)
    for line in advice:
        print(line, file=sys.stderr)
    return OF_TASK[config.task_type](config, arguments.no_model)


def _check_dialogues(config: RunConfig, no_model: bool) -> Report:
    """Rows and tokens; the tokenizer is all that is needed of the model."""
    from dataclasses import replace

    from lora_scripts.base_loras import find_base_loras
    from lora_scripts.dialogues.checks import check_dialogues
    from lora_scripts.dialogues.display import describe_examples, length_histogram
    from lora_scripts.dialogues.reading import read_dialogues, require_dialogues
    from lora_scripts.models.language_model import load_tokenizer, most_tokens
    from lora_scripts.models.source import resolve_base_model

    require_dialogues(config)
    find_base_loras(config)
    source = resolve_base_model(config.base_model, allow_download=config.allow_download, task=config.task_type)
    tokenizer = load_tokenizer(source.path, source.name)
    read = read_dialogues(config, tokenizer, most_tokens(source.path, source.name), _progress("dialogues"))
    report = check_dialogues(read.data, read.train, read.template)
    shown = ["", *length_histogram(read.train), "", *describe_examples(read.train, tokenizer)]
    return replace(report, shown=shown)


def _check_pictures(config: RunConfig, no_model: bool) -> Report:
    import torch

    from lora_scripts.base_loras import find_base_loras, with_base_loras
    from lora_scripts.data.cache import EncodingCache, cache_folder
    from lora_scripts.data.dataset import open_dataset
    from lora_scripts.data.folders import require_folders
    from lora_scripts.devices import choose_device, choose_dtype
    from lora_scripts.families import family_class
    from lora_scripts.folding import fold_base_loras
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.preflight.model_step import LoadedModel
    from lora_scripts.preflight.run import preflight

    require_folders(config)
    beneath = find_base_loras(config)
    source = resolve_base_model(config.base_model, allow_download=config.allow_download, task=config.task_type)
    source = with_base_loras(source, beneath)
    # Without a step the model only answers questions (its size, its tokenizer): the graphics card stays free for others.
    device = torch.device("cpu") if no_model else choose_device(config.device)
    dtype = torch.bfloat16 if no_model else choose_dtype(config, device, source)
    family = family_class(source.family).load(source, config, device, dtype)
    fold_base_loras(family.components, beneath)
    resolution = config.resolution or (family.default_resolution, family.default_resolution)
    try:
        # A batch larger than the data set is refused there; here it is a finding, beside what made the data set so small.
        dataset = open_dataset(config.model_copy(update={"batch_size": 1}), resolution)
    except DataError as error:
        return _nothing_to_train(error)
    return preflight(
        config,
        dataset,
        resolution,
        EncodingCache(cache_folder(config)),
        LoadedModel(family, device),
        measure=not no_model,
        progress=_progress(),
    )


OF_TASK = {"text-to-image": _check_pictures, "text-generation": _check_dialogues}


def _check_folder(arguments: argparse.Namespace) -> Report:
    from lora_scripts.config_file import make_config
    from lora_scripts.data.cache import EncodingCache, cache_folder
    from lora_scripts.data.dataset import open_dataset
    from lora_scripts.data.folders import require_folders
    from lora_scripts.preflight.run import check_data

    if arguments.set:
        raise ConfigError("--set: goes with --config; --input checks a folder without settings.")
    values = {"train_data_dir": str(arguments.input), "base_model": "-", "output_dir": tempfile.gettempdir()}
    config, _ = make_config({**values, "resolution": arguments.resolution or BARE_RESOLUTION}, "check")
    assert config.resolution is not None
    require_folders(config)
    try:
        dataset = open_dataset(config, config.resolution)
    except DataError as error:
        return _nothing_to_train(error)
    folder = cache_folder(config)
    # A read-only folder is checked all the same, but nothing is kept of it: there is no run whose folder could hold it.
    cache = EncodingCache(folder if folder.parent == config.data_dir else None)
    return check_data(config, dataset, cache, _clip_cut(), _progress())


def _nothing_to_train(error: DataError) -> Report:
    from lora_scripts.preflight.findings import Finding, Report

    remedy = "Put readable pictures with captions into the folder."
    return Report([Finding("red", "no-pictures", str(error), remedy=remedy)], 0, 0)


def _clip_cut() -> Callable[[str], str]:
    """What CLIP's text encoder, which Stable Diffusion reads captions with, takes in of a caption."""
    from lora_scripts.models.clip_tokenizer import packaged_clip_tokenizer

    tokenizer = packaged_clip_tokenizer()
    most = int(tokenizer.model_max_length) - 2

    def cut(caption: str) -> str:
        spans = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        return caption if len(spans) <= most else caption[: spans[most - 1][1]]

    return cut


def _progress(what_of: str = "pictures") -> Callable[[str, int, int], None]:
    """A line that counts them on a terminal; silent elsewhere, and on standard error so that --json stays clean."""
    if not sys.stderr.isatty():
        return lambda what, done, total: None

    def show(what: str, done: int, total: int) -> None:
        end = "\r" if done < total else "\r" + " " * 40 + "\r"
        print(
            f"\rlooking at {what_of}: {done} of {total}" if done < total else "", end=end, file=sys.stderr, flush=True
        )

    return show
