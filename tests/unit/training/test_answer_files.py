"""The page of answers that each step leaves."""

from __future__ import annotations

from pathlib import Path

from helpers.told import answers
from lora_scripts.dialogues.answers import Answer
from lora_scripts.training.answer_files import AnswerFiles, answer_page
from lora_scripts.training.events import Answers


def test_each_step_leaves_a_page_with_prompts_answers_and_alarms(tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path / "samples")
    files.answered(answers(0))
    files.answered(answers(100, "2 of 2 answers do not end."))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-000000.md", "step-000100.md"]
    page = (tmp_path / "samples" / "step-000100.md").read_text(encoding="utf-8")
    assert page.startswith("# Step 100\n\n**2 of 2 answers do not end.**\n\n## 1\n\n```text\nWhere is it?\n```\n")
    assert (
        "With the LoRA:\n\n```text\nIt arrives\ntoday, dear (100).\n```\n\nIn the data:\n\n```text\nToday, dear."
        in page
    )
    assert page.count("In the data:") == 1


def test_an_answer_that_was_cut_off_is_marked_and_none_can_end_its_block() -> None:
    evil = "before\n````\n# heading"
    page = answer_page(Answers(1, ["?"], [Answer("", True, 1)], [Answer(evil, False, 9)]))
    assert f"With the LoRA (cut off):\n\n`````text\n{evil}\n`````\n" in page
