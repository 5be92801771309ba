"""The report of a language model's run: its answers, and no word of pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.report_page import Page
from lora_scripts.dialogues.answers import Answer
from lora_scripts.preflight.findings import Finding, Report
from lora_scripts.report import ReportFacts, render_report
from lora_scripts.report.usage import use_folder
from lora_scripts.training.events import Answers, Events, RunStart, StepReport, Validation
from lora_scripts.training.memory import MemoryReading
from lora_scripts.training.record import RunHistory, RunRecord, read_record
from lora_scripts.words import DIALOGUES

EVIL = "<script>alert('x')</script> \"quoted\" & <img src=x onerror=alert(1)>"


def told(step: int, *alarms: str) -> Answers:
    base = [Answer("No idea.", True, 3), Answer(f"I {EVIL}", False, 160)]
    return Answers(
        step, ("Where is it?", EVIL), base, [Answer(f"Soon, dear ({step}).", True, 9)] * 2, alarms, ("Dear.", "")
    )


def history_of(folder: Path) -> RunHistory:
    events = Events([RunRecord(folder / "record.jsonl")])
    settings: dict[str, Any] = {"task_type": "text-generation", "base_model": "m", "lora_rank": 16, "flip": False}
    texts = [("train.jsonl:1", f"user: Hi\nassistant: {EVIL}"), ("train.jsonl:2", "user: Ho\nassistant: Hu")]
    events.started(RunStart(settings, [("base model", "tiny (causal_lm)"), ("device", "CPU")], texts, 0, 40))
    events.answered(told(0))
    for step in (20, 40):
        reading = MemoryReading(2**30, 3 * 2**29, "process")
        losses = [0.3] * 20
        events.stepped(
            StepReport(step, 40, step / 6, losses, 0.25, {"language_model": 1e-4}, 0.5, 2500.0, 9.0, reading)
        )
        events.validated(Validation(step, [0.5, 0.4], [0.3, 0.3]))
        events.answered(told(step, *(["2 of 2 answers do not end."] if step == 40 else [])))
    (folder / "nice").mkdir()
    (folder / "nice" / "adapter_model.safetensors").write_bytes(b"x" * 300_000)
    (folder / "nice" / "adapter_config.json").write_bytes(b"x" * 300)
    events.finished([folder / "nice", *sorted((folder / "nice").iterdir())])
    events.close()
    return read_record(folder / "record.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def history(folder: Path) -> RunHistory:
    return history_of(folder)


@pytest.fixture(scope="module")
def page(history: RunHistory, folder: Path) -> Page:
    facts = ReportFacts(
        name="nice",
        words=DIALOGUES,
        num_examples=24,
        left_out=[("train.jsonl:9", f"its answer is empty {EVIL}")],
        check=Report(
            [Finding("amber", "short-answers", "Two are short.", ["train.jsonl:3"], "Look.")], 24, 25, words=DIALOGUES
        ),
        chosen_step=20,
        worst_fitted_texts=[("train.jsonl:4", f"user: {EVIL}", "loss 2 times the usual. Is it right?")],
        use=use_folder("nice", "m", folder / "nice", 16, "Be kind, 'dear'."),
    )
    return Page(render_report(history, facts))


def test_answers_stand_side_by_side_at_the_finished_files_step(page: Page) -> None:
    words = page.by_id["answers"]
    assert "with the LoRA of step 20" in words
    first = words.index("Where is it?")
    order = [
        first,
        *(words.index(each, first) for each in ("No idea.", "step 20 ✔ finished file", "Soon, dear (20).", "Dear.")),
    ]
    assert order == sorted(order)
    assert "Step 40: 2 of 2 answers do not end." in words


def test_answers_by_step_begin_with_the_base_model_and_mark_the_finished_file(page: Page) -> None:
    steps = page.by_id["answers"].split("Answers by step")[1]
    assert re.search(r"base modelstep 20 ✔ finished filestep 40(?! ✔)", steps)
    assert re.search(r"No idea\.Soon, dear \(20\)\.Soon, dear \(40\)\.", steps)
    assert " … cut off" in steps


def test_steps_are_thinned_to_seven_and_their_number_said() -> None:
    page = Page(render_report(RunHistory(answers={step: told(step) for step in range(0, 101, 10)}), ReportFacts()))
    heads = [a for a in page.tags("th") if a.get("scope") == "col"]
    assert len(heads) == 1 + 7
    assert "3 more steps lie in the samples folder." in page.by_id["answers"]


def test_other_prompts_of_an_earlier_start_leave_a_gap() -> None:
    other = Answers(10, ("Another?",), [Answer("Old.", True, 1)], [Answer("Other answer.", True, 2)])
    page = Page(render_report(RunHistory(answers={10: other, 20: told(20)}), ReportFacts()))
    assert "Other answer." not in page.by_id["answers"]


def test_verdict_says_what_on_what_and_how_to_use_the_folder(page: Page, folder: Path) -> None:
    assert "nice is a LoRA for m, trained on 24 dialogues for 40 steps" in page.text
    assert "is a PEFT adapter, which transformers and vLLM load as it is" in page.text
    assert f"lora-scripts chat --base-model m --lora {folder / 'nice'} --system 'Be kind, " in page.text
    assert "用 24 条对话训练了 40 步" in page.text
    assert "PEFT 格式" in page.text


def test_nothing_speaks_of_pictures(page: Page) -> None:
    shown = re.sub(r"\s+", " ", page.text.replace(page.by_id["settings"], ""))
    assert not re.findall(r"\b[^ ]* ?(?:picture|caption|image|noise|WebUI|<lora:)[^ ]*", shown)
    assert "图片" not in shown


def test_settings_of_the_other_task_are_left_out(page: Page) -> None:
    assert "lora_rank" in page.by_id["settings"]
    assert "flip" not in page.by_id["settings"]


def test_folder_comes_with_its_whole_size_and_each_files_purpose(page: Page) -> None:
    files = page.by_id["files"]
    assert files.count("0.3 MB") == 2  # the folder, and the weights in it
    assert "The trained weights." in files
    assert "llama.cpp" in files
    assert "vllm serve m --enable-lora --max-lora-rank 16" in files


def test_nothing_a_user_wrote_becomes_markup(page: Page) -> None:
    assert len(page.tags("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for anchor in ("answers", "worst-fitted", "data"):
        assert EVIL in page.by_id[anchor], anchor


def test_curves_and_check_count_in_dialogues_and_tokens(page: Page) -> None:

    assert "trained tokens" in page.by_id["curves"]
    assert "held-out dialogues" in page.by_id["curves"]
    assert "24 of 25 dialogues could be trained on" in page.by_id["check"]
