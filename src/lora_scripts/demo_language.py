"""`lora-scripts demo --task text-generation`: the whole job on made-up dialogues and the built-in language model.

The model knows a small shop and answers in plain sentences. A hundred and some dialogues teach it another manner; rules that
share nothing with what wrote the dialogues then say how many answers have the manner, and how many are still right.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.demo import open_demo_folder, percent, share
from lora_scripts.errors import ConfigError, did_you_mean
from lora_scripts.report.facts import Measurement

if TYPE_CHECKING:
    from lora_scripts.builtin.dialogue_world import Talk

__all__ = ["MANNERS", "AnswerReading", "Manner", "manners", "measure_answers", "run_language_demo"]

BASE_MODEL = "builtin:mini-llama"
NUM_MEASURED = 200
NUM_SHOWN = 4
MOST_TOKENS = 96


@dataclass(frozen=True)
class Manner:
    """A manner of answering that the base model was never shown.

    Attributes:
        title: for people.
        dialogues: seed and number to dialogues in this manner.
        questions: seed and number to questions in wordings that no dialogue shows.
        has_it: whether an answer has the manner.
        figure: what the share of such answers is called.
        num_dialogues, max_steps, learning_rate: what it takes to learn it; a whole tone is more than a form.
    """

    title: str
    dialogues: Callable[[int, int], list[Talk]]
    questions: Callable[[int, int], list[Talk]]
    has_it: Callable[[str], bool]
    figure: str
    num_dialogues: int
    max_steps: int
    learning_rate: float


def manners() -> dict[str, Manner]:
    """The table of them; imported on demand, because a world comes with it."""
    from lora_scripts.builtin import dialogue_world as world

    return {
        "customer service": Manner(
            "a warm customer-service tone",
            world.service_dialogues,
            world.questions,
            world.reads_as_customer_service,
            "answers in the customer-service tone",
            num_dialogues=240,
            max_steps=300,
            learning_rate=1.5e-3,
        ),
        "json": Manner(
            "strict JSON",
            world.json_dialogues,
            lambda seed, count: world.questions(seed, count, products_only=True),
            world.parses_as_json,
            "answers that parse as one JSON object",
            num_dialogues=160,
            max_steps=150,
            learning_rate=1e-3,
        ),
    }


MANNERS = ("customer service", "json")


@dataclass(frozen=True)
class AnswerReading:
    """Shares 0..1 of the answers to the same questions, without and with the LoRA."""

    manner_before: float
    manner_after: float
    right_before: float
    right_after: float

    @property
    def right_kept(self) -> float:
        """Right answers with the LoRA, as a share of those without it."""
        return self.right_after / self.right_before if self.right_before else 0.0

    def measurements(self, figure: str) -> list[Measurement]:
        """The figures for people."""
        return [
            Measurement(
                figure, percent(self.manner_before), percent(self.manner_after), "by a rule that training never sees"
            ),
            Measurement(
                "answers with the right fact",
                percent(self.right_before),
                percent(self.right_after),
                f"{self.right_kept:.0%} of before",
            ),
        ]


def run_language_demo(output: Path, name: str = "customer service", seed: int = 42) -> int:
    """Writes dialogues, trains, asks, measures and reports into `output`; the exit code.

    Raises:
        ConfigError: no such manner.
        DataError: the folder holds something else.
    """
    if name not in MANNERS:
        raise ConfigError(
            f"--style {name}: no such manner.{did_you_mean(name, MANNERS)} There are: {', '.join(MANNERS)}."
        )
    manner = manners()[name]
    began = time.monotonic()
    open_demo_folder(output)

    print(
        f"1. Writing {manner.num_dialogues} dialogues in {manner.title}, which the base model never saw ...", flush=True
    )
    write_dialogues(output / "dialogues", manner.dialogues(seed, manner.num_dialogues))

    print("2. Training ...", flush=True)
    config = language_demo_config(output, name, manner, seed)
    shutil.rmtree(config.output_dir, ignore_errors=True)  # an older demo's run; a new one begins at the beginning
    from lora_scripts.train_command import STOPPED, train_and_report

    outcome = train_and_report(config)
    if not outcome.complete:
        return STOPPED

    print(f"3. Asking {NUM_MEASURED} questions without and with the LoRA, and measuring ...", flush=True)
    questions = manner.questions(seed + 1_000_003, NUM_MEASURED)
    reading, answers = measure_answers(config.base_model, outcome.files[0], manner, questions)

    from lora_scripts.report.build import build_report

    report = build_report(config, outcome, reading.measurements(manner.figure))
    print()
    for question, (before, after) in list(zip(questions, answers, strict=True))[:NUM_SHOWN]:
        print(f"   {question.question[-1]['content']}\n      without: {before}\n      with:    {after}")
    print()
    for figure in reading.measurements(manner.figure):
        print(f"   {figure.label}: {figure.before} before, {figure.after} after ({figure.note})")
    folder = outcome.files[0]
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Look at:")
    print(f"   {report}   the whole story")
    print(f"   {folder}   the LoRA, as transformers, PEFT and vLLM load it")
    print(
        f"\nTalk with it:\n   lora-scripts chat --base-model {BASE_MODEL} --lora {folder} --side-by-side\n"
        "Now with your own dialogues:\n"
        '   one {"input": ..., "output": ...} per line in MY_DIALOGUES/train.jsonl\n'
        "   lora-scripts train --config configs/my_chat_lora.yaml"
    )
    return 0


def write_dialogues(folder: Path, talks: Sequence[Talk]) -> None:
    """`train.jsonl` with OpenAI messages, one dialogue a line; an older demo's files go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file():
            old.unlink()
    lines = [json.dumps({"messages": list(talk.messages)}, ensure_ascii=False) for talk in talks]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def language_demo_config(output: Path, name: str, manner: Manner, seed: int) -> RunConfig:
    """The run's settings; also written to the folder as a YAML that `lora-scripts train` takes."""
    import yaml

    settings = {
        "task_type": "text-generation",
        "train_data_dir": (output / "dialogues").as_posix(),
        "base_model": BASE_MODEL,
        "output_dir": (output / name.replace(" ", "_")).as_posix(),
        # A small model has little to spare: a higher rank and larger steps than models of some billion weights need.
        "lora_rank": 16,
        "batch_size": 8,
        "max_steps": manner.max_steps,
        "learning_rate": manner.learning_rate,
        "save_steps": manner.max_steps // 3,
        "seed": seed,
        "sample_tokens": MOST_TOKENS,
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (output / "demo_chat.yaml").write_text(
        f"# The settings of the demo's run: lora-scripts train --config {output}/demo_chat.yaml\n{text}", "utf-8"
    )
    return RunConfig.model_validate(settings)


def measure_answers(
    base_model: str, folder: Path, manner: Manner, questions: Sequence[Talk]
) -> tuple[AnswerReading, list[tuple[str, str]]]:
    """What the rules find without and with the LoRA, and both answers to every question."""
    import torch

    from lora_scripts.answering.generate import Answerer
    from lora_scripts.builtin.dialogue_world import is_right
    from lora_scripts.dialogues.answers import AnswerRequest
    from lora_scripts.dialogues.conversation import Message
    from lora_scripts.export.names import LANGUAGE_MODEL
    from lora_scripts.export.reader import read_lora_file
    from lora_scripts.models.language_model import load_language_model, load_tokenizer
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA

    source = resolve_base_model(base_model)
    model = load_language_model(source.path, source.name, torch.float32)
    answerer = Answerer(model, load_tokenizer(source.path, source.name))

    def ask() -> list[str]:
        requests = [
            AnswerRequest(tuple(Message(m["role"], m["content"]) for m in talk.question), max_new_tokens=MOST_TOKENS)  # type: ignore[arg-type]
            for talk in questions
        ]
        return [answerer.answer(request).text for request in requests]

    before = ask()
    with LoRASet({LANGUAGE_MODEL: model}, [WeightedLoRA(read_lora_file(folder).weights)]):
        after = ask()

    def right(answers: Sequence[str]) -> float:
        judged = [(talk.asked, text) for talk, text in zip(questions, answers, strict=True) if talk.asked is not None]
        return share(is_right(asked, text) for asked, text in judged)

    reading = AnswerReading(
        share(map(manner.has_it, before)), share(map(manner.has_it, after)), right(before), right(after)
    )
    return reading, list(zip(before, after, strict=True))
