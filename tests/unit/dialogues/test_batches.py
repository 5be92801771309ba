"""Dialogues as the loop sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from helpers.tiny_causal_lms import tokenizer
from lora_scripts.data.sampler import Sample, StepPlan
from lora_scripts.data.split import measured_on, split
from lora_scripts.dialogues.batches import DialogueBatches, dialogue_batches
from lora_scripts.dialogues.opening import open_dialogues
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.tokenise import tokenise
from lora_scripts.words import DIALOGUES


def read(folder: Path, *, packed: bool = True) -> DialogueBatches:
    rows = open_dialogues(folder).train
    return dialogue_batches(rows, tokenise(rows, ChatTemplate(tokenizer()), max_length=500), packed=packed)


def batches_of(folder: Path, rows: int, *, packed: bool = True) -> DialogueBatches:
    folder.mkdir(exist_ok=True)
    lines = [f'{{"input": "question {i}", "output": "{"yes " * (i + 1)}{i}"}}' for i in range(rows)]
    (folder / "train.jsonl").write_text("\n".join(lines), "utf-8")
    return read(folder, packed=packed)


def test_batch_holds_the_tokens_and_the_places_of_what_is_learnt(tmp_path: Path) -> None:
    data = batches_of(tmp_path, 3)
    batch = data.batch([Sample(2, "0/0/c"), Sample(0, "0/0/a")], torch.device("cpu"))
    for row, index in enumerate((2, 0)):
        example = data.examples[index].tokens
        length, count = batch.filled["tokens"][row], batch.filled["targets"][row]
        assert batch.tensors["tokens"][row, :length].tolist() == example.tokens.tolist()
        assert batch.tensors["targets"][row, :count].tolist() == np.flatnonzero(example.trained).tolist()
    assert list(batch.keys) == ["0/0/c", "0/0/a"]
    learnt = batch.tensors["targets"][1, : batch.filled["targets"][1]]
    assert tokenizer().decode(batch.tensors["tokens"][1][learnt]) == "yes 0<|end|>"


def test_without_packing_dialogues_of_like_length_go_together(tmp_path: Path) -> None:
    packed, padded = batches_of(tmp_path / "a", 40), batches_of(tmp_path / "b", 40, packed=False)
    assert {example.shape for example in packed.examples} == {(0, 0)}
    plan = StepPlan.of(padded.examples, 4, seed=1)
    for step in plan.epoch(0):
        for uses in plan.micro_batches(step, 4):
            costs = [padded.examples[use.index].cost for use in uses]
            assert max(costs) <= 1.2 * min(costs) + 1  # a fourth of a doubling


def test_identity_follows_content_and_not_the_number_of_rows_alone(tmp_path: Path) -> None:
    one, same = batches_of(tmp_path / "a", 30), batches_of(tmp_path / "b", 30)
    assert one.dataset.identity() == same.dataset.identity()
    assert list(one.dataset.identity()) == ["train.jsonl"]
    file = tmp_path / "b" / "train.jsonl"
    file.write_text(file.read_text("utf-8").replace("yes 0", "no 0"), "utf-8")
    assert read(tmp_path / "b").dataset.identity() != one.dataset.identity()


def test_dialogues_are_held_out_by_content(tmp_path: Path) -> None:
    parts = split(batches_of(tmp_path, 50), "auto", DIALOGUES)
    assert parts.held_out is not None
    assert len(parts.held_out.examples) == 4
    assert "4 dialogues are held out" in parts.note
    assert {e.name for e in parts.held_out.examples}.isdisjoint(e.name for e in parts.train.examples)


def test_file_for_measuring_leaves_all_rows_in_training(tmp_path: Path) -> None:
    data, dev = batches_of(tmp_path / "a", 50), batches_of(tmp_path / "b", 30)
    parts = measured_on(data, dev, "auto", DIALOGUES)
    assert parts.held_out is not None
    assert (len(parts.train.examples), len(parts.held_out.examples), len(parts.reference)) == (50, 16, 16)
    assert measured_on(data, dev, 0, DIALOGUES).held_out is None
    assert len(measured_on(data, dev, 5, DIALOGUES).reference) == 5


def test_no_more_is_measured_than_what_trains_to_compare_it_with(tmp_path: Path) -> None:
    parts = measured_on(batches_of(tmp_path / "a", 3), batches_of(tmp_path / "b", 30), "auto", DIALOGUES)
    assert parts.held_out is not None
    assert (len(parts.held_out.examples), len(parts.reference)) == (3, 3)
