"""Every finding about dialogues on data that has just that fault, and on data that has none."""

from __future__ import annotations

import json

import pytest

from helpers import chat_templates as shapes
from helpers.tiny_tokenizers import tiny_tokenizer
from lora_scripts.data.dataset import LeftOut
from lora_scripts.dialogues.checks import check_dialogues
from lora_scripts.dialogues.conversation import Dialogue, Message, content_digest
from lora_scripts.dialogues.dialogue_set import DialogueData, DialogueSet
from lora_scripts.dialogues.display import describe_examples, learnt_runs, length_histogram
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.dialogues.tokenise import tokenise
from lora_scripts.preflight.findings import Finding, Report


def row(line: int, question: str, answer: str) -> Dialogue:
    messages = (Message("user", question), Message("assistant", answer))
    return Dialogue(f"train.jsonl:{line}", messages, "", content_digest(messages, ""))


GOOD = [row(line, f"Where is parcel {line}?", f"Parcel {line} arrives today.") for line in range(1, 31)]


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer("byte_level", shapes.CHATML))


def check(
    template: ChatTemplate,
    rows: list[Dialogue],
    *,
    dev: list[Dialogue] | None = None,
    left_out: tuple[LeftOut, ...] = (),
    max_length: int = 4000,
) -> Report:
    data = DialogueData(DialogueSet(rows, left_out), None if dev is None else DialogueSet(dev))
    return check_dialogues(data, tokenise(data.train, template, max_length=max_length), template)


def found(report: Report, code: str) -> Finding:
    return {finding.code: finding for finding in report.findings}[code]


def test_good_data_give_nothing_but_a_note_on_tokens(template: ChatTemplate) -> None:
    report = check(template, GOOD, dev=[row(99, "Where is it?", "On its way.")])
    assert [finding.code for finding in report.findings] == ["tokens"]
    assert (report.num_trained, report.num_examples) == (30, 30)
    json.dumps(report.to_json())


LONG = "It was sent this morning and will be with you in the course of the afternoon, as we said"


@pytest.mark.parametrize(
    ("rows", "code", "level", "names"),
    [
        ([row(31, "Where is parcel 3?", "Parcel 3 arrives today.")], "exact-duplicates", "amber", ["train.jsonl:31"]),
        ([row(31, "Where is parcel 3?", "No idea.")], "several-answers", "note", ["train.jsonl:3", "train.jsonl:31"]),
        ([row(31, "a", "cafÃ©")], "encoding-faults", "amber", ["train.jsonl:31"]),
        ([row(31, "a", "b<|im_end|>")], "template-marks", "amber", ["train.jsonl:31"]),
        ([row(31, "a", "你好，请问我的包裹在哪里？今天下午到。")], "other-script", "note", ["train.jsonl:31"]),
        ([row(31, "a", "word, " * 2000)], "very-long", "note", ["train.jsonl:31"]),
        ([row(31, "a", "b")], "very-short", "note", ["train.jsonl:31"]),
        (
            [row(line, f"q {line}", LONG if line < 35 else LONG + ".") for line in range(31, 61)],
            "answers-unfinished",
            "amber",
            [f"train.jsonl:{line}" for line in range(31, 35)],
        ),
    ],
)
def test_each_fault_is_found_where_it_is(
    template: ChatTemplate, rows: list[Dialogue], code: str, level: str, names: list[str]
) -> None:
    finding = found(check(template, [*GOOD, *rows]), code)
    assert (finding.level, list(finding.names)) == (level, names)


def test_answers_that_never_end_with_a_mark_are_a_habit(template: ChatTemplate) -> None:
    report = check(template, [row(line, f"q {line}", LONG) for line in range(1, 41)])
    assert "answers-unfinished" not in [finding.code for finding in report.findings]


def test_many_contradictions_are_amber(template: ChatTemplate) -> None:
    report = check(template, [*GOOD[:4], *(row(line, "Where?", f"Here {line}.") for line in range(31, 35))])
    assert found(report, "several-answers").level == "amber"


def test_dev_rows_that_train_are_named_with_the_row_they_are(template: ChatTemplate) -> None:
    leaked = Dialogue("dev.jsonl:1", GOOD[2].messages, "", GOOD[2].digest)
    finding = found(check(template, GOOD, dev=[leaked]), "dev-rows-trained")
    assert finding.details == {"dev.jsonl:1": "is train.jsonl:3"}


def test_rows_that_were_left_out_are_told_by_kind(template: ChatTemplate) -> None:
    left_out = (
        LeftOut("train.jsonl:40", "is no valid JSON"),
        LeftOut("train.jsonl:41", "the answer is empty"),
        LeftOut("train.jsonl:42", "named in exclude"),
    )
    report = check(template, GOOD, left_out=left_out)
    assert list(found(report, "unreadable").names) == ["train.jsonl:40"]
    assert list(found(report, "answers-empty").names) == ["train.jsonl:41"]
    assert (report.num_trained, report.num_examples) == (30, 32)


def test_cut_rows_say_how_much_is_cut_and_what_length_would_do(template: ChatTemplate) -> None:
    report = check(template, [*GOOD, row(31, "a", "word, " * 100)], max_length=80)
    finding = found(report, "truncated")
    assert list(finding.names) == ["train.jsonl:31"]
    assert "of them are cut" in finding.details["train.jsonl:31"]
    assert "Raise max_length (the longest has" in finding.remedy


def test_max_length_below_most_questions_blocks(template: ChatTemplate) -> None:
    report = check(template, GOOD, max_length=8)
    assert report.blocked
    assert found(report, "nothing-to-learn").level == "red"
    assert found(report, "no-dialogues").level == "red"


@pytest.mark.parametrize("kind", ["byte_level", "prepended"])
def test_shown_examples_mark_what_is_learnt(kind: str) -> None:
    template = ChatTemplate(tiny_tokenizer(kind, shapes.CHATML))
    data = DialogueSet([*GOOD, row(31, "Where?", "Here.\nThere.")])
    lines = describe_examples(tokenise(data, template, max_length=4000), template.tokenizer)
    assert sum(": " in line and line.startswith("train.jsonl:") for line in lines) == 3
    text = "\n".join(lines).replace("[[ ", "[[").replace(" <|", "<|")
    assert "[[Here.\n  | There.<|im_end|>]]" in text
    assert text.count("[[") == text.count("]]") == 4  # with the sentence that explains them


def test_learnt_runs_are_the_whole_text(template: ChatTemplate) -> None:
    (example,) = tokenise(DialogueSet([GOOD[0]]), template, max_length=4000).examples
    runs = list(learnt_runs(example, template.tokenizer))
    assert [trained for _, trained in runs] == [False, True]
    assert "".join(run for run, _ in runs) == template.tokenizer.decode(example.tokens.tolist())


def test_histogram_counts_every_example_once_by_its_uncut_length(template: ChatTemplate) -> None:
    result = tokenise(DialogueSet([*GOOD, row(31, "a", "word, " * 100)]), template, max_length=80)
    lines = length_histogram(result)
    counts = [int(line.split("tokens")[1].split()[0]) for line in lines]
    assert sum(counts) == 31
    assert counts[-1] == 1
    assert int(lines[-1].split("-")[0]) > 80
    assert 2 < len(lines) <= 10


def test_histogram_begins_at_the_shortest(template: ChatTemplate) -> None:
    result = tokenise(DialogueSet(GOOD), template, max_length=4000)
    lengths = [example.cost for example in result.examples]
    lines = length_histogram(result)
    assert int(lines[0].split("-")[0]) <= min(lengths)
    assert int(lines[0].split("tokens")[1].split()[0]) > 0
    assert int(lines[-1].split("-")[1].split()[0]) >= max(lengths)


def test_nothing_to_show_is_no_fault(template: ChatTemplate) -> None:
    result = tokenise(DialogueSet([]), template, max_length=80)
    assert describe_examples(result, template.tokenizer) == length_histogram(result) == []
