"""`lora-scripts sample` for a language model: prompts answered by the base model and by each LoRA, side by side."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    from lora_scripts.answering.voices import Voices
    from lora_scripts.dialogues.answers import Answer, AnswerRequest

__all__ = ["sample_answers"]


@dataclass(frozen=True)
class _Asked:
    """One prompt with everybody's answer."""

    prompt: str
    seed: int
    answers: Mapping[str, Answer]


def sample_answers(args: argparse.Namespace, prompts: Sequence[str]) -> int:
    """Asks everybody, shows and writes what they say; the exit code.

    Raises:
        ConfigError: an option is wrong.
        ModelError: the base model or a LoRA cannot be used.
        DataError: a prompt is too long, or the file cannot be written.
    """
    from lora_scripts.answering.chat_command import answer_faults
    from lora_scripts.answering.voices import BASE, named_loras, open_voices

    write = _writer(args.output)
    faults = answer_faults(args)
    if args.count > 1 and not args.temperature:
        faults.append(
            "--count: without a --temperature every answer to a prompt is the same. Set one, or leave it out."
        )
    if faults:
        raise ConfigError(faults)
    loras = named_loras(args.lora)
    voices = open_voices(args.base_model, loras, args.device, allow_download=args.download)
    asked: list[_Asked] = []
    for prompt in prompts:
        for seed in range(args.seed, args.seed + args.count):
            request = _request(args, prompt, seed)
            answers = {who: voices.answer(who, request, args.weight) for who in [BASE, *voices.names]}
            asked.append(_Asked(prompt, seed, answers))
            print(_shown(asked[-1]), flush=True)
            write(voices, asked)
    for line in _alarms(asked, voices.names, args.max_tokens):
        print(line)
    if args.output is not None:
        print(args.output)
    return 0


def _request(args: argparse.Namespace, prompt: str, seed: int) -> AnswerRequest:
    from lora_scripts.dialogues.answers import AnswerRequest
    from lora_scripts.dialogues.conversation import Message

    system = (Message("system", args.system),) if args.system else ()
    asked = (*system, Message("user", prompt))
    return AnswerRequest(asked, "", args.max_tokens, args.temperature, args.top_p, seed)


def _shown(asked: _Asked) -> str:
    """For the terminal: who says what, further lines below the first."""
    width = max(len(who) for who in asked.answers)
    lines = [f"> {asked.prompt}"]
    for who, answer in asked.answers.items():
        text = answer.text.replace("\n", "\n" + " " * (width + 2))
        lines.append(f"{who:>{width}}  {text}{'' if answer.ended else ' [cut off]'}")
    return "\n".join(lines) + "\n"


def _alarms(asked: Sequence[_Asked], names: Sequence[str], max_new_tokens: int) -> list[str]:
    from lora_scripts.answering.alarms import alarms
    from lora_scripts.answering.voices import BASE

    base = [each.answers[BASE] for each in asked]
    return [
        f"{name}: {line}"
        for name in names
        for line in alarms(base, [each.answers[name] for each in asked], max_new_tokens)
    ]


def _writer(path: Path | None) -> Callable[[Voices, Sequence[_Asked]], None]:
    """Writes all answers so far, so that nothing is lost when the next one fails."""
    from lora_scripts.atomic import write_atomically

    if path is None:
        return lambda voices, asked: None
    form = {".md": _page, ".jsonl": _rows}.get(path.suffix.lower())
    if form is None:
        raise ConfigError(f"--output {path}: answers are written to a file ending in .md or .jsonl.")
    return lambda voices, asked: write_atomically(path, form(voices.title, asked).encode("utf-8", errors="replace"))


def _rows(title: str, asked: Sequence[_Asked]) -> str:
    return "".join(json.dumps({"base_model": title, **asdict(each)}, ensure_ascii=False) + "\n" for each in asked)


def _page(title: str, asked: Sequence[_Asked]) -> str:
    parts = [f"# Answers of {title}"]
    for each in asked:
        parts += [f"## {_plain(each.prompt)}"]
        for who, answer in each.answers.items():
            parts += [f"**{_plain(who)}**{'' if answer.ended else ' (cut off)'}", _quoted(answer.text)]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {_plain(line)}  " for line in text.split("\n"))


def _plain(text: str) -> str:
    """Without anything that Markdown would act on."""
    return re.sub(r"([\\`*_{}\[\]#|<>~&])", r"\\\1", text)
