"""Measures mini-llama on held-out wordings, and writes quality_llama.json and quality_llama.md.

    python tools/make_builtin/measure_llama.py --models FOLDER [--count 1000]

Without --models the weights inside the package are measured. About a minute on two quiet CPU cores.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from llama_answers import answer_all
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_scripts.builtin.dialogue_world import (
    held_out_dialogues,
    is_right,
    parses_as_json,
    questions,
    reads_as_customer_service,
)
from lora_scripts.builtin.dialogue_world.wordings import ORDER_KINDS, PRODUCT_KINDS
from lora_scripts.builtin.weights import builtin_path

FIRST_SEED = 40_000_000
"""No training uses seeds from here on."""


def group(kind: str) -> str:
    """The row of the table that a kind of question belongs to."""
    if kind in PRODUCT_KINDS or kind in ("told", "greeting", "thanks", "sold", "not sold", "not known"):
        return kind
    return "orders and hours" if kind in ORDER_KINDS else "the shop"


def measure(folder: Path, count: int) -> dict[str, float]:
    """Shares between 0 and 1, by what was measured."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    talks = held_out_dialogues(FIRST_SEED, count)
    answers = answer_all(model, tokenizer, [t.question for t in talks])
    rows: dict[str, list[bool]] = defaultdict(list)
    for talk, answer in zip(talks, answers, strict=True):
        right = is_right(talk.asked, answer.text)
        rows["all held-out dialogues"].append(right)
        rows[f"right: {group(talk.asked.kind)}"].append(right)
        if len(talk.question) > 2:
            rows["right: later turns"].append(right)
        if talk.question[0]["role"] == "system" and talk.asked.told:
            rows["right: told by the system message"].append(right)
        rows["ends with the end-of-turn token"].append(answer.ended)
    singles = questions(FIRST_SEED + 1, count)
    for talk, answer in zip(singles, answer_all(model, tokenizer, [t.question for t in singles]), strict=True):
        rows["single questions right"].append(is_right(talk.asked, answer.text))
        rows["reads as customer service"].append(reads_as_customer_service(answer.text))
        rows["parses as JSON"].append(parses_as_json(answer.text))
    return {name: sum(values) / len(values) for name, values in sorted(rows.items())}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=None, help="folder that holds mini-llama/")
    parser.add_argument("--out", type=Path, default=Path("build/builtin/quality"))
    parser.add_argument("--count", type=int, default=1000)
    given = parser.parse_args()
    folder = given.models / "mini-llama" if given.models else builtin_path("mini-llama")
    figures = measure(folder, given.count)
    table = "\n".join(f"| {name} | {100 * value:.1f} % |" for name, value in figures.items())
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "quality_llama.json").write_text(json.dumps(figures, indent=1) + "\n")
    text = f"| measured on {given.count} held-out dialogues | share |\n|---|---|\n{table}\n"
    (given.out / "quality_llama.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
