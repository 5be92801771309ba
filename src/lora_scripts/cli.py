"""The command `lora-scripts` and its sub-commands. Heavy libraries are imported by what runs, never for `--help`."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_scripts import __version__
from lora_scripts.errors import LoraScriptsError

__all__ = ["main"]

INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """All sub-commands; each stores the function that runs it under `run`."""
    from lora_scripts.adapter_files.convert_command import add_arguments as add_convert_arguments
    from lora_scripts.adapter_files.inspect_command import add_arguments as add_inspect_arguments
    from lora_scripts.answering.chat_command import add_arguments as add_chat_arguments
    from lora_scripts.captioners.command import add_arguments as add_label_arguments
    from lora_scripts.check_command import add_arguments as add_check_arguments
    from lora_scripts.export.command import add_arguments as add_export_arguments
    from lora_scripts.lora_tools.bake_command import add_arguments as add_bake_arguments
    from lora_scripts.lora_tools.extract_command import add_arguments as add_extract_arguments
    from lora_scripts.lora_tools.resize_command import add_arguments as add_resize_arguments
    from lora_scripts.merging.command import add_arguments as add_merge_arguments
    from lora_scripts.plan_command import add_arguments as add_plan_arguments
    from lora_scripts.sampling.command import add_arguments as add_sample_arguments

    parser = argparse.ArgumentParser(
        prog="lora-scripts",
        description="Pictures in, a LoRA file that works in your own tools out. Nothing leaves this machine.",
        epilog="First time here: lora-scripts demo",
    )
    parser.add_argument("--version", action="version", version=f"lora-scripts {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="see the whole job done in five minutes, on built-in models")
    demo.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    demo.add_argument(
        "--task", choices=["text-to-image", "text-generation"], default="text-to-image", help="pictures or a chat model"
    )
    demo.add_argument(
        "--style", help='of the pictures (default: ink wash), or of the answers: "customer service", json'
    )
    demo.add_argument("--seed", type=int, default=42, help="another seed, another data set (default: 42)")
    demo.set_defaults(run=_demo)

    label = commands.add_parser("label", help="write captions for a folder of pictures")
    add_label_arguments(label)
    label.set_defaults(run=_label)

    check = commands.add_parser("check", help="say what is wrong with a data set and what a run will take, before it")
    add_check_arguments(check)
    check.set_defaults(run=_check)

    plan = commands.add_parser("plan", help="say what memory, time and disk a run will take, from its config alone")
    add_plan_arguments(plan)
    plan.set_defaults(run=_plan)

    train = commands.add_parser("train", help="train a LoRA from one YAML file")
    train.add_argument("--config", type=Path, required=True, help="the run's settings, see configs/")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; may be given several times"
    )
    train.add_argument(
        "--keep", choices=["best", "last"], help="which saved step becomes the finished file (default: best)"
    )
    train.add_argument("--force", action="store_true", help="train also when the check of the data finds something red")
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="render prompts with LoRA files, or a grid of checkpoints")
    add_sample_arguments(sample)
    sample.set_defaults(run=_sample)

    chat = commands.add_parser("chat", help="talk with a language model and its LoRAs")
    add_chat_arguments(chat)
    chat.set_defaults(run=_chat)

    merge = commands.add_parser("merge", help="add LoRAs to a model's weights for good, or several LoRAs up into one")
    add_merge_arguments(merge)
    merge.set_defaults(run=_merge)

    resize = commands.add_parser("resize", help="make a LoRA file smaller")
    add_resize_arguments(resize)
    resize.set_defaults(run=_resize)

    extract = commands.add_parser("extract", help="take a LoRA from a tuned checkpoint and its base")
    add_extract_arguments(extract)
    extract.set_defaults(run=_extract)

    bake = commands.add_parser("bake", help="turn a LoHa, LoKr, DoRA or OFT into a plain LoRA")
    add_bake_arguments(bake)
    bake.set_defaults(run=_bake)

    export = commands.add_parser("export", help="write a language model's LoRA for vLLM, llama.cpp, mlx-lm or PEFT")
    add_export_arguments(export)
    export.set_defaults(run=_export)

    inspect = commands.add_parser(
        "inspect", help="say what a LoRA file is, how strong it is, and which programs read it"
    )
    add_inspect_arguments(inspect)
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="write a LoRA for pictures in the spelling of another program")
    add_convert_arguments(convert)
    convert.set_defaults(run=_convert)

    targets = commands.add_parser("targets", help="list the layers of a base model that can get an adapter")
    targets.add_argument("base_model", help="as base_model in a config")
    targets.set_defaults(run=_targets)

    settings = commands.add_parser("settings", help="explain every setting, or those whose name holds a word")
    settings.add_argument("word", nargs="?", default="", help="part of a setting's name")
    settings.set_defaults(run=_settings)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code: 0 well, 2 a user's mistake (said in plain words), 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that lacks a character must not end a run
    # Nothing is fetched that the user did not ask for; `allow_download` and `--download` lift this for one model.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # They tell everyone who imports them what kernels they lack, and diffusers and PEFT import what is installed.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Importing makes a million objects that stay: a fifth of its time was looking at them.
    gc.set_threshold(50_000, 20, 20)
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except LoraScriptsError as error:
        print(str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. Finished files and checkpoints are intact.", file=sys.stderr)
        return INTERRUPTED
    return code


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.task == "text-generation":
        from lora_scripts.demo_language import run_language_demo

        return run_language_demo(arguments.output, arguments.style or "customer service", arguments.seed)
    from lora_scripts.demo import run_demo

    return run_demo(arguments.output, arguments.style or "ink wash", arguments.seed)


def _label(arguments: argparse.Namespace) -> int:
    from lora_scripts.captioners.command import run

    return run(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from lora_scripts.check_command import run

    return run(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from lora_scripts.plan_command import run

    return run(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from lora_scripts.config_file import load_config

    config, advice = load_config(
        arguments.config, [*arguments.set, *([f"keep={arguments.keep}"] if arguments.keep else [])]
    )
    from lora_scripts.train_command import train_command  # after the config is known to be good: it brings torch

    return train_command(config, advice, arguments.force)


def _sample(arguments: argparse.Namespace) -> int:
    from lora_scripts.sampling.command import run

    return run(arguments)


def _chat(arguments: argparse.Namespace) -> int:
    from lora_scripts.answering.chat_command import run

    return run(arguments)


def _merge(arguments: argparse.Namespace) -> int:
    from lora_scripts.merging.command import run

    return run(arguments)


def _resize(arguments: argparse.Namespace) -> int:
    from lora_scripts.lora_tools.resize_command import run

    return run(arguments)


def _extract(arguments: argparse.Namespace) -> int:
    from lora_scripts.lora_tools.extract_command import run

    return run(arguments)


def _bake(arguments: argparse.Namespace) -> int:
    from lora_scripts.lora_tools.bake_command import run

    return run(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from lora_scripts.export.command import run

    return run(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    from lora_scripts.adapter_files.inspect_command import run

    return run(arguments)


def _convert(arguments: argparse.Namespace) -> int:
    from lora_scripts.adapter_files.convert_command import run

    return run(arguments)


def _targets(arguments: argparse.Namespace) -> int:
    from lora_scripts.pipeline import list_targets

    for line in list_targets(arguments.base_model):
        print(line)
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    from lora_scripts.settings_page import describe_settings

    print(describe_settings(arguments.word))
    return 0
