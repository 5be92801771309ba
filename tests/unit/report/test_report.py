"""The report of a real record, read back with an HTML parser."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.report_page import Page
from lora_scripts.choosing.rule import Gain, StepScore
from lora_scripts.errors import DataError
from lora_scripts.preflight.findings import Finding, Report
from lora_scripts.preflight.terminal import report_notes
from lora_scripts.report import HardThumbnail, Measurement, ReportFacts, Thumbnail, render_report, write_report
from lora_scripts.training.events import Events, Preview, RunStart, StepReport
from lora_scripts.training.memory import MemoryReading
from lora_scripts.training.record import RunHistory, RunRecord, SampleFiles, read_record
from lora_scripts.training.validation import Estimate

EVIL = "<script>alert('x')</script> \"quoted\" & <img src=x onerror=alert(1)>"
SECTIONS = {
    "before-after": "Before and after",
    "measured": "Measured effect",
    "previews": "Previews by step",
    "files": "Files",
    "next": "Next",
    "curves": "Curves",
    "worst-fitted": "Worst fitted",
    "check": "Data check",
    "data": "Data",
    "settings": "Settings",
    "notes": "Advice and notes",
    "environment": "Run and environment",
}


def record_run(folder: Path, prompts: tuple[str, ...] = ("a cat", EVIL), finished: bool = True) -> RunHistory:
    """A run of 40 steps told to the listeners that the report is made from."""
    events = Events([SampleFiles(folder / "samples"), RunRecord(folder / "record.jsonl")])
    events.note(f"warned of {EVIL}", "warning")
    settings = {"base_model": "/home/someone/v1-5.safetensors", "lora_rank": 16, "batch_size": 4, "description": EVIL}
    settings |= {"max_grad_norm": 1.0, "learning_rate": 2e-4}
    facts = [("device", "CPU, 2 threads")]
    events.started(RunStart(settings, facts, [("a.png", EVIL), ("b.png", "a dog")], 0, 40))
    events.previewed(Preview(0, prompts, [Image.new("RGB", (64, 64), "red") for _ in prompts]))
    for step in range(10, 41, 10):
        reading = MemoryReading(2**30, 3 * 2**29, "process")
        losses = [0.3 - (step + i) / 500 for i in range(10)]
        events.stepped(StepReport(step, 40, step / 6, losses, 0.25, {"unet": 1e-4}, 0.5, 3.0, 9.0, reading))
        events.saved(step, folder / f"checkpoint-{step}")
        events.previewed(Preview(step, prompts, [Image.new("RGB", (64, 64), "blue") for _ in prompts]))
    if finished:
        (folder / "ink.safetensors").write_bytes(b"x" * 250_000)
        events.finished([folder / "ink.safetensors"])
    events.close()
    return read_record(folder / "record.jsonl")


CHECK = Report(
    [
        Finding(
            "red", "captions-missing", f"most have no caption {EVIL}", [f"{i}.png" for i in range(25)], "Label them."
        ),
        Finding("amber", "near-duplicates", "One is a copy.", ["b.png"], "Keep one.", {"b.png": f"of a.png {EVIL}"}),
        Finding("note", "prediction", "Predicted: 3 min."),
    ],
    24,
    25,
)


def full_facts(**changes: Any) -> ReportFacts:
    values: dict[str, Any] = {
        "name": "ink",
        "trigger": "inkstyle",
        "num_examples": 24,
        "thumbnails": [Thumbnail(Image.new("RGB", (300, 200), "green"), f"{i}.png", EVIL) for i in range(70)],
        "left_out": [("bad.png", f"cannot be decoded {EVIL}")],
        "bucket_counts": {"512x512": 20, "448x576": 4},
        "check": CHECK,
        "measurements": [Measurement("Read as ink wash", "2 %", "97 %", EVIL), Measurement("Loss", "0.11", "0.06")],
        "worst_fitted": [
            HardThumbnail(
                Thumbnail(Image.new("RGB", (300, 200), "green"), "7.png", EVIL),
                "loss 2 times the usual",
                "Is it right?",
            )
        ],
        "chosen_step": 40,
        "chosen_why": "Step 40 is as good as any.",
        "step_scores": [
            StepScore(20, [("held-out loss", "0.1200")], Gain(Estimate(0.4, 0.1), 2.0, {})),
            StepScore(40, [("held-out loss", "0.1300"), ("look", "-0.20")], None),
        ],
        "verification": ["192 tensors read back"],
        "advice": ["15 to 20 epochs are enough"],
        "next_commands": [("Render", 'lora-scripts sample --prompt "<lora:ink:0.8>"')],
    }
    return ReportFacts(**(values | changes))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> RunHistory:
    return record_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(history: RunHistory) -> str:
    return render_report(history, full_facts())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_section_is_there_and_linked(page: Page) -> None:
    links = {attributes["href"] for attributes in page.tags("a")}
    for anchor, title in SECTIONS.items():
        assert title in page.by_id[anchor]
        assert f"#{anchor}" in links


def test_headings_come_in_english_and_chinese(page: Page) -> None:
    chinese = [attributes for attributes in page.tags("span") if attributes.get("lang") == "zh"]
    assert len(chinese) >= len(SECTIONS)
    for words in ("训练前后", "训练曲线", "训练数据", "训练设置", "输出文件"):
        assert words in page.text


def test_verdict_says_what_on_what_how_long_and_how_to_use_it(page: Page) -> None:
    assert "ink is a LoRA for v1-5.safetensors, trained on 24 pictures for 40 steps (6.67 epochs)" in page.text
    assert "on CPU, 2 threads" in page.text
    assert "<lora:ink:0.8>" in page.text
    assert "trigger word inkstyle" in page.text
    assert "someone" not in page.text.split("Before and after")[0]


def test_nothing_a_user_wrote_becomes_markup(html: str, page: Page) -> None:
    assert len(page.tags("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(attributes["src"].startswith("data:image/") for attributes in page.tags("img"))
    assert "<script>alert" not in html
    for anchor in ("before-after", "measured", "previews", "worst-fitted", "check", "data", "settings", "notes"):
        assert EVIL in page.by_id[anchor], anchor


def test_page_needs_nothing_from_outside(html: str, page: Page) -> None:
    assert not page.tags("link")
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", html)
    policy = next(a["content"] for a in page.tags("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_policy_admits_exactly_the_script_on_the_page(html: str, page: Page) -> None:
    import hashlib

    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(a["content"] for a in page.tags("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy


def colour_of(attributes: dict[str, str]) -> tuple[int, ...]:
    data = base64.b64decode(attributes["src"].split(",", 1)[1])
    return tuple(round(value / 85) for value in Image.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5)))  # type: ignore[union-attr]


def test_saved_steps_stand_side_by_side_with_the_chosen_one_marked(page: Page) -> None:
    words = page.by_id["files"]
    assert "held-out losslookBetter than the last step by" in words
    assert "200.1200-+0.40 ± 0.10" in words
    assert "40 ✔ finished file0.1300-0.20-" in words


def test_worst_fitted_picture_comes_with_caption_loss_and_hint(page: Page) -> None:
    words = page.by_id["worst-fitted"]
    assert (
        words.index(EVIL) < words.index("7.png") < words.index("loss 2 times the usual") < words.index("Is it right?")
    )


def test_before_and_after_show_step_0_and_the_last(page: Page) -> None:
    before = [a for a in page.tags("img") if a["alt"] == "Before: a cat"]
    after = [a for a in page.tags("img") if a["alt"] == "With the LoRA: a cat"]
    assert [colour_of(a) for a in before] == [(3, 0, 0)]
    assert [colour_of(a) for a in after] == [(0, 0, 3)]


def test_grid_has_a_row_per_prompt_and_a_column_per_step(page: Page) -> None:
    cells = [a["alt"] for a in page.tags("img") if a["alt"].startswith("Step ") and a["alt"].endswith(": a cat")]
    assert cells == [f"Step {step}: a cat" for step in (0, 10, 20, 30, 40)]


def test_same_prompt_twice_gives_two_rows(tmp_path: Path) -> None:
    page = Page(render_report(record_run(tmp_path, ("a cat", "a cat")), ReportFacts()))
    assert len([a for a in page.tags("img") if a["alt"] == "Before: a cat"]) == 2
    assert len([a for a in page.tags("img") if a["alt"] == "Step 10: a cat"]) == 2


def test_many_previews_are_thinned_to_seven_columns_with_both_ends(history: RunHistory) -> None:
    previews = dict.fromkeys(range(0, 1001, 10), history.previews[10])
    page = Page(render_report(RunHistory(previews=previews), ReportFacts()))
    heads = [a for a in page.tags("th") if a.get("scope") == "col"]
    assert len(heads) == 7
    assert "base model" in page.by_id["previews"]
    assert "step 1,000" in page.by_id["previews"]
    assert "7 of 101 steps are shown" in page.by_id["previews"]


def test_curves_are_drawn_for_every_reading(page: Page) -> None:
    labels = [a["aria-label"] for a in page.tags("svg")]
    assert [label.split(":")[0] for label in labels] == ["Loss", "Learning rate", "Gradient norm", "Speed", "Memory"]
    assert all(not re.search("nan|inf", a["d"]) for a in page.tags("path"))


def test_data_check_says_what_was_found_where_and_what_to_do(page: Page) -> None:
    check = page.by_id["check"]
    assert "24 of 25 pictures could be trained on; 1 red finding, trained all the same." in check
    assert check.index("most have no caption") < check.index("One is a copy.") < check.index("Predicted: 3 min.")
    assert "0.png, 1.png" in check
    assert "19.png and 5 more" in check
    assert "b.png of a.png" in check
    assert "Keep one." in check


def test_what_the_check_found_stands_nowhere_twice(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "record.jsonl")
    for text, _ in report_notes(CHECK):
        record.note(text, "warning")
    record.note("another warning", "warning")
    record.started(RunStart({}, [], [], 0, 1))
    record.close()
    page = Page(render_report(read_record(tmp_path / "record.jsonl"), ReportFacts(check=CHECK)))
    assert "another warning" in page.by_id["notes"]
    assert page.text.count("One is a copy.") == 1


def test_clean_check_is_one_sentence() -> None:
    page = Page(render_report(RunHistory(), ReportFacts(check=Report([], 8, 8))))
    assert "8 of 8 pictures could be trained on; nothing to complain of." in page.by_id["check"]
    assert "What to do" not in page.by_id["check"]


def test_data_section_counts_and_names(page: Page) -> None:
    data = page.by_id["data"]
    assert "24 trained, 1 left out." in data
    assert "bad.png" in data
    assert "512 × 512" in data
    assert "10 more are not shown." in data
    sizes = {(a["width"], a["height"]) for a in page.tags("img") if a["alt"] == EVIL}
    assert sizes == {("192", "128")}


def test_settings_differing_from_their_default_are_marked(html: str) -> None:
    rows = re.findall(r"<tr( class=\"changed\")?><td><code>(\w+)</code></td>", html)
    assert {key for mark, key in rows if mark} == {"lora_rank", "description"}
    assert {"batch_size", "learning_rate"} <= {key for _, key in rows}


def test_settings_the_user_wrote_are_listed_first(history: RunHistory) -> None:
    html = render_report(history, full_facts(written_settings={"batch_size", "base_model", "unheard_of"}))
    first = html.split('id="settings"')[1].split("<details>")[0]
    assert re.findall(r"<td><code>(\w+)</code></td><td><code>", first) == ["base_model", "batch_size"]


def test_files_come_with_size_and_place(page: Page) -> None:
    files = page.by_id["files"]
    assert "ink.safetensors" in files
    assert "0.2 MB" in files
    assert "models/Lora" in files
    assert "models/loras" in files
    assert "192 tensors read back" in files


def test_measurements_in_percent_are_drawn_as_bars(page: Page) -> None:
    widths = [a["style"] for a in page.tags("div") if a.get("class") in ("fill", "fill now") and "bars" not in a]
    assert {"width:2%", "width:97%"} <= set(widths)


def test_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    page = Page(render_report(record_run(tmp_path, finished=False), ReportFacts(name="ink")))
    assert "Stopped at step 40" in page.text
    assert "running the same command again goes on from checkpoint-40" in page.text
    assert "files" not in page.by_id


def test_empty_history_gives_a_page_with_what_is_known(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", RunHistory(), ReportFacts())
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "No step of this run has been recorded." in page.text
    assert set(page.by_id) == {"environment"}


def test_missing_and_broken_sample_files_leave_gaps_not_errors(tmp_path: Path) -> None:
    history = record_run(tmp_path)
    (tmp_path / "samples" / "step-000010-1.png").unlink()
    (tmp_path / "samples" / "step-000020-1.png").write_bytes(b"no picture")
    page = Page(render_report(history, ReportFacts()))
    shown = [a["alt"] for a in page.tags("img") if a["alt"].endswith(": a cat") and a["alt"].startswith("Step")]
    assert shown == ["Step 0: a cat", "Step 30: a cat", "Step 40: a cat"]


def test_names_that_are_not_text_do_not_stop_the_report(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", RunHistory(), ReportFacts(name="\udcff\x00", left_out=[("\x1b.png", "bad")]))
    assert "\N{REPLACEMENT CHARACTER}.png" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_report_in_a_place_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        write_report(tmp_path / "report.html", RunHistory(), ReportFacts())


def test_long_run_stays_a_small_file(history: RunHistory) -> None:
    losses = [0.1 + i % 7 / 100 for i in range(100_000)]
    long = RunHistory(steps=list(range(1, 100_001)), losses=losses, reports=history.reports)
    assert len(render_report(long, ReportFacts())) < 150_000


def test_the_finished_files_step_is_what_is_shown_and_explained(history: RunHistory) -> None:
    page = Page(render_report(history, full_facts(chosen_step=20, chosen_why="Step 20 is better by 0.02 ± 0.01.")))
    assert "with the LoRA of step 20" in page.by_id["before-after"]
    assert "step 20 ✔ finished file" in page.by_id["previews"]
    assert "step 40 ✔" not in page.by_id["previews"]
    assert "Step 20 is better by 0.02 ± 0.01." in page.by_id["files"]
    assert "holds the weights of step 20" in page.text
    assert "第 20 步" in page.text


def test_nothing_is_said_of_another_step_when_the_last_is_the_finished_file(history: RunHistory) -> None:
    page = Page(render_report(history, full_facts(chosen_step=40)))
    assert "holds the weights of" not in page.text
    assert "with the LoRA of step 40" in page.by_id["before-after"]
