"""`lora-scripts chat`: talk with a language model and its LoRAs in the terminal, or through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    from lora_scripts.answering.chat import ChatSettings

__all__ = ["add_answer_arguments", "add_arguments", "answer_faults", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--base-model", required=True, help="folder, hub id or builtin:mini-llama")
    parser.add_argument("--no-adapter", action="store_true", help="begin with the base model alone")
    parser.add_argument("--side-by-side", action="store_true", help="base model and every LoRA answer each question")
    add_answer_arguments(parser)
    parser.add_argument("--seed", type=int, default=42, help="of the first answer; counts up (default: 42)")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:1, mps or cpu")
    parser.add_argument("--download", action="store_true", help="allow fetching --base-model from the hub")


def add_answer_arguments(parser: argparse._ActionsContainer) -> None:
    """Declares what all commands that ask a language model have in common."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FOLDER[=NAME]",
        help="PEFT folder of a language model's LoRA; may be given several times",
    )
    parser.add_argument("--weight", type=float, default=1.0, help="how strongly a LoRA works (default: 1)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system text before the first question")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 (default) takes the likeliest word, 1 draws as the model would",
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest words only (default: 1)")


def answer_faults(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of `add_answer_arguments`, one line each."""
    faults = []
    for name, lowest, highest in (
        ("weight", -10, 10),
        ("max_tokens", 1, 100_000),
        ("temperature", 0, 10),
        ("top_p", 0.01, 1),
        ("seed", 0, 2**62),
    ):
        if not lowest <= getattr(args, name) <= highest:
            faults.append(f"--{name.replace('_', '-')} {getattr(args, name)}: must be between {lowest} and {highest}.")
    return faults


def run(args: argparse.Namespace) -> int:
    """Talks until the input ends; the exit code. Through a pipe the answers alone are written to standard output.

    Raises:
        ConfigError: an option is wrong.
        ModelError: the base model or a LoRA cannot be used.
    """
    from lora_scripts.answering.voices import named_loras

    faults = answer_faults(args)
    if faults:
        raise ConfigError(faults)
    loras = named_loras(args.lora)
    from lora_scripts.answering.chat import HELP, Chat
    from lora_scripts.answering.voices import open_voices

    voices = open_voices(args.base_model, loras, args.device, allow_download=args.download)
    talking = sys.stdin.isatty()
    chat = Chat(
        voices, _settings(args, voices.names), sys.stdout, sys.stdout if talking else sys.stderr, labels=talking
    )
    if talking:
        print(f"{' + '.join([voices.title, *voices.names])}\n{HELP}")
    for line in _typed() if talking else sys.stdin:
        if not chat.take(line):
            break
    return 0


def _settings(args: argparse.Namespace, names: list[str]) -> ChatSettings:
    from lora_scripts.answering.chat import ChatSettings
    from lora_scripts.answering.voices import BASE

    return ChatSettings(
        BASE if args.no_adapter or not names else names[0],
        args.weight,
        args.side_by_side,
        args.system,
        args.max_tokens,
        args.temperature,
        args.top_p,
        args.seed,
    )


def _typed() -> Iterator[str]:
    """Lines from the keyboard until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and a history for input()
    while True:
        try:
            yield input("you> ")
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)")
        except EOFError:
            print()
            return
