"""Rows with two answers: every known shape becomes the same pair; what is none says why; both answers reach the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_causal_lms import tokenizer
from lora_scripts.config import RunConfig
from lora_scripts.data.sampler import Sample
from lora_scripts.dialogues.conversation import Message
from lora_scripts.dialogues.formats import RowError
from lora_scripts.dialogues.pair_batches import PairBatches, joined
from lora_scripts.dialogues.pairs import parse_pair
from lora_scripts.dialogues.reading import read_dialogues
from lora_scripts.dialogues.turns import NothingToLearnError

USER, GOOD, BAD = Message("user", "Hi"), Message("assistant", "Hello"), Message("assistant", "What?")
SYSTEM = Message("system", "Be kind.", trained=False)
ASKED = (Message("user", "Hi", trained=False),)
user, good, bad = ({"role": m.role, "content": m.content} for m in (USER, GOOD, BAD))
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"},
        {"Prompt": [user], "chosen": [good], "rejected": [bad], "score": 3},
        {"prompt": "Hi", "chosen": [good], "rejected": "What?"},
        {"prompt": [user], "chosen": [user, good], "rejected": [user, bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {
            "chosen": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "rejected": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "What?"}],
        },
    ],
)
def test_every_shape_is_the_same_pair(row: dict[str, Any]) -> None:
    pair = parse_pair(row)
    assert pair.messages == (*ASKED, GOOD)
    assert pair.rejected == (*ASKED, BAD)
    with_system = parse_pair({**row, "system": "Be kind."})
    assert with_system.messages == (SYSTEM, *ASKED, GOOD)
    assert with_system.rejected == (SYSTEM, *ASKED, BAD)


def test_rows_of_the_page_are_pairs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "preference.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("{")]
    assert len(rows) == 3
    assert all(parse_pair(json.loads(row)).rejected for row in rows)


def test_only_the_compared_answer_is_learnt() -> None:
    again = {"role": "user", "content": "And?"}
    pair = parse_pair({"chosen": [user, good, again, good], "rejected": [user, good, again, bad]})
    assert [message.trained for message in pair.messages] == [False, False, False, True]
    assert pair.rejected[:3] == pair.messages[:3]
    assert pair.rejected[3] == BAD


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input": "a", "output": "b"}, 'no "chosen" and "rejected" answer'),
        (["a"], "is a list instead of an object"),
        ({"chosen": "b", "rejected": "c"}, "has no question"),
        ({"prompt": "a", "chosen": [user], "rejected": [bad]}, '"chosen" is not one answer'),
        ({"prompt": "a", "chosen": [good, user, good], "rejected": [bad]}, '"chosen" is not one answer'),
        ({"prompt": "a", "chosen": "b", "rejected": []}, '"rejected" is not one answer'),
        ({"prompt": [user, good], "chosen": [good], "rejected": [bad]}, "question that ends with an answer"),
        ({"prompt": "a", "chosen": 1, "rejected": "c"}, "is a number instead of text"),
        ({"chosen": [], "rejected": []}, "has no question"),
    ],
)
def test_row_that_is_no_pair_says_why(row: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_pair(row)


def test_equal_answers_are_left_out_and_do_not_count_as_unreadable() -> None:
    with pytest.raises(NothingToLearnError, match="its two answers are the same"):
        parse_pair({"prompt": "a", "chosen": "b", "rejected": "b"})


def read(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> PairBatches:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    values = {
        "task_type": "text-generation",
        "train_data_dir": str(folder),
        "base_model": "b",
        "output_dir": "o",
        "objective": "dpo",
        **changes,
    }
    batches = read_dialogues(RunConfig.model_validate(values), tokenizer(), 64).train_batches(packed=True)
    assert isinstance(batches, PairBatches)
    return batches


def test_both_answers_reach_the_model_with_their_marks(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"prompt": "Hello", "chosen": "x", "rejected": "Good day"},
    ]
    data = read(tmp_path, rows)
    batch = joined(data.batch([Sample(0, "a"), Sample(1, "b")], CPU))
    texts = []
    for row, (length, count) in enumerate(zip(batch.filled["tokens"], batch.filled["targets"], strict=True)):
        tokens = batch.tensors["tokens"][row, :length]
        learnt = tokens[batch.tensors["targets"][row, :count]]
        texts.append((tokenizer().decode(tokens), tokenizer().decode(learnt)))
    assert texts == [
        ("<|user|>Hi<|end|><|assistant|>Hello<|end|>", "Hello<|end|>"),
        ("<|user|>Hello<|end|><|assistant|>x<|end|>", "x<|end|>"),
        ("<|user|>Hi<|end|><|assistant|>No<|end|>", "No<|end|>"),
        ("<|user|>Hello<|end|><|assistant|>Good day<|end|>", "Good day<|end|>"),
    ]
    assert data.examples[0].cost == sum(batch.filled["tokens"][place] for place in (0, 2))
    assert data.examples[0].num_trained == sum(batch.filled["targets"][place] for place in (0, 2))


def test_pair_that_loses_one_answer_is_left_out_by_name(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": f"b{n}"} for n in range(11)]
    rows[3] = {"prompt": "long " * 20, "chosen": "a", "rejected": "b"}
    rows[5]["rejected"] = " "
    rows[7]["rejected"] = "a"
    data = read(tmp_path, rows, max_length=40)
    assert [example.name for example in data.examples] == [
        f"train.jsonl:{n + 1}" for n in range(11) if n not in (3, 5, 7)
    ]
    reasons = {item.name: item.reason for item in data.dataset.left_out}
    assert "beyond max_length 40" in reasons["train.jsonl:4"]
    assert "empty" in reasons["train.jsonl:6"]
    assert reasons["train.jsonl:8"] == "its two answers are the same"
    assert "9 of 11 dialogues train." in data.dataset.summary()[0]


def test_checkpoint_notices_a_change_of_either_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Ho", "chosen": "a", "rejected": "c"}]
    before = read(tmp_path, rows)
    for key in ("prompt", "chosen", "rejected"):
        changed = read(tmp_path, [rows[0], rows[1] | {key: "x"}])
        assert changed.dataset.identity() != before.dataset.identity()
        assert changed.examples[1].digest != before.examples[1].digest
    assert read(tmp_path, rows).dataset.identity() == before.dataset.identity()
