"""`python tools/auto_label.py` as a user runs it: exit codes, what stands on the terminal, being killed."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.tiny_captioners import write_blip, write_clip
from lora_scripts.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_blip(root / "blip")
    write_clip(root / "clip")
    return root


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "style_train"
    folder.mkdir(parents=True)
    for number in range(8):
        draw(folder / f"img{number}.png", number)
    return folder


def draw(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(path)


def environment(home: Path) -> dict[str, str]:
    """No models, no hub cache and no network for the program that is run."""
    dropped = ("PYTHONPATH", "LORA_SCRIPTS_CAPTION_MODEL", "LORA_SCRIPTS_RANK_MODEL")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1", "https_proxy": "http://127.0.0.1:9"}


def start(home: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "auto_label.py"), *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=home,
        env=environment(home),
        # A test run in the background of a shell ignores Ctrl-C, and its children would inherit that.
        preexec_fn=None if os.name == "nt" else lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def label(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """The command in this process: exit code, and what stands on the terminal."""
    try:
        code = main(["label", *map(str, arguments)])
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def nothing_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("LORA_SCRIPTS_CAPTION_MODEL", "LORA_SCRIPTS_RANK_MODEL"):
        monkeypatch.delenv(name, raising=False)


def rows(table: Path) -> dict[str, str]:
    with table.open(encoding="utf-8", newline="") as file:
        return {row["filename"]: row["prompt"] for row in csv.DictReader(file)}


def test_the_command_of_the_documentation_writes_the_table(tmp_path: Path, pictures: Path, models: Path) -> None:
    table = "data/style_train/metadata.csv"
    process = start(tmp_path, "--input", "data/style_train", "--output", table, "--model", models / "blip")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert list(rows(tmp_path / table)) == [f"img{number}.png" for number in range(8)]
    assert re.search(r"8 captions written in [\d.]+ s \([\d.]+ images/s\)", out)
    assert f"Caption model: {models / 'blip'} (folder, fp32)" in out
    assert "Device: CPU" in out


@pytest.mark.usefixtures("nothing_on_this_machine")
class TestInOneProcess:
    def test_a_second_run_finds_nothing_to_do(self, capsys, pictures: Path, models: Path) -> None:
        assert label(capsys, "--input", pictures, "--model", models / "blip")[0] == 0
        before = rows(pictures / "metadata.csv")
        code, out, _ = label(capsys, "--input", pictures, "--model", models / "blip")
        assert code == 0
        assert "8 kept." in out
        assert rows(pictures / "metadata.csv") == before

    def test_the_table_may_lie_elsewhere(self, capsys, tmp_path: Path, pictures: Path, models: Path) -> None:
        code, _, _ = label(capsys, "--input", pictures, "--output", "metadata.csv", "--model", models / "blip")
        assert code == 0
        assert len(rows(tmp_path / "metadata.csv")) == 8
        assert not (pictures / "metadata.csv").exists()

    @pytest.mark.fault(7)
    def test_row_7_a_bad_picture_ends_with_3_and_its_reason(self, capsys, pictures: Path, models: Path) -> None:
        whole = (pictures / "img0.png").read_bytes()
        (pictures / "cut [1].png").write_bytes(whole[: len(whole) // 2])
        code, out, _ = label(capsys, "--input", pictures, "--model", models / "blip")
        assert code == 3
        assert "1 picture without a caption:" in out
        assert "  cut [1].png: cannot be decoded (truncated file)." in out
        assert len(rows(pictures / "metadata.csv")) == 8

    @pytest.mark.fault(7)
    def test_with_bad_pictures_alone_it_ends_with_2(self, capsys, tmp_path: Path, models: Path) -> None:
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "a.png").touch()
        code, out, _ = label(capsys, "--input", "bad", "--model", models / "blip")
        assert code == 2
        assert "a.png: the file is empty" in out

    def test_clip_chooses_and_the_review_shows_the_runner_up(self, capsys, pictures: Path, models: Path) -> None:
        arguments = ["--captioner", "clip-blip", "--model", models / "blip", "--rank-model", models / "clip"]
        code, out, _ = label(capsys, "--input", pictures, "--trigger", "mystyle", *arguments)
        assert code == 0
        assert f"Chosen by: {models / 'clip'}" in out
        assert all(text.startswith("mystyle, ") for text in rows(pictures / "metadata.csv").values())
        code, out, _ = label(capsys, "--input", pictures, "--review", "3")
        assert code == 0
        assert out.count("second best: ") == 3
        assert out.count("  doubt ") == 3

    def test_dry_run_shows_a_diff_and_writes_nothing(self, capsys, pictures: Path, models: Path) -> None:
        code, out, _ = label(
            capsys, "--input", pictures, "--model", models / "blip", "--trigger", "mystyle", "--dry-run"
        )
        assert code == 0
        assert "8 pictures would get a caption" in out
        before, after = re.findall(r"^  - ", out, re.MULTILINE), re.findall(r"^  \+ mystyle, ", out, re.MULTILINE)
        assert len(before) == len(after) == 5
        assert not (pictures / "metadata.csv").exists()

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--model", "no/such-model"], r"no hub model of that name on this machine\. Either add --download"),
            (["--model", "./nowhere"], "no such folder"),
            (["--captioner", "blip", "--rank-model", "x"], "--rank-model has no effect with --captioner blip"),
            (["--captioner", "clip-blip", "--candidates", "1"], "leaves clip-blip nothing to choose from"),
            (["--rules-only", "--overwrite"], "exclude each other"),
            (["--min-tokens", "9", "--max-tokens", "3"], "--min-tokens 9 is above --max-tokens 3"),
            (["--download"], "--download has no effect"),
            (["--device", "cuda:77"], "cuda:77"),
            (["--precision", "fp16", "--device", "cpu"], "--precision fp16: is not made for CPUs"),
            (["--batch-size", "0"], "no whole number above 0"),
            (["--top-p", "1.5"], "not above 0 and at most 1"),
            (["--replace", "cat"], "should be OLD=NEW"),
            (["--rules", "nowhere.yaml"], "no such rules file"),
            (["--output", "x.jsonl"], "captions are written as CSV"),
            (["--captioner", "blop"], "invalid choice"),
        ],
    )
    def test_a_mistake_ends_with_2_and_a_clear_message(
        self, capsys, pictures: Path, arguments: list[str], reason: str
    ) -> None:
        code, _, err = label(capsys, "--input", pictures, *arguments)
        assert code == 2
        assert re.search(reason, err)
        assert not (pictures / "metadata.csv").exists()

    def test_a_missing_folder_ends_with_2(self, capsys) -> None:
        code, _, err = label(capsys, "--input", "nowhere")
        assert (code, err) == (2, "nowhere: no such folder. Give the folder that holds the pictures.\n")


def many(folder: Path, count: int = 150) -> None:
    for number in range(count):
        draw(folder / f"img{number:03d}.png", number)


def wait_for_rows(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    journal = folder / "metadata.labels.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"ended too early: {process.communicate()}")


def test_a_killed_run_loses_at_most_a_few_rows_and_goes_on(
    tmp_path: Path, pictures: Path, models: Path, capsys
) -> None:
    many(pictures)
    arguments = ["--model", models / "blip", "--batch-size", "4", "--device", "cpu"]
    journal = pictures / "metadata.labels.jsonl"
    stream = random.Random(1)
    for _ in range(2):
        before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        process = start(tmp_path, "--input", pictures, *arguments)
        wait_for_rows(pictures, process, before + stream.randrange(5, 30))
        process.kill()
        process.communicate()
    # Whole lines of the journal are captions: every one of them is kept.
    written = len(
        {json.loads(line)["filename"] for line in journal.read_text("utf-8").split("\n")[:-1] if '"filename"' in line}
    )
    code, out, _ = label(capsys, "--input", pictures, *arguments)
    assert code == 0
    assert int(re.search(r"(\d+) kept", out)[1]) >= written >= 10
    found = rows(pictures / "metadata.csv")
    assert len(found) == 158
    (tmp_path / "twin").mkdir()
    for file in pictures.glob("*.png"):
        (tmp_path / "twin" / file.name).write_bytes(file.read_bytes())
    label(capsys, "--input", tmp_path / "twin", *arguments)
    assert rows(tmp_path / "twin" / "metadata.csv") == found


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child on Windows")
def test_ctrl_c_saves_what_is_done_and_tells_how_to_go_on(tmp_path: Path, pictures: Path, models: Path) -> None:
    many(pictures, 300)
    arguments = ["--input", pictures, "--model", models / "blip", "--batch-size", "2"]
    process = start(tmp_path, *arguments)
    wait_for_rows(pictures, process, 6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    left = int(re.search(r"the same command goes on with the other (\d+)", out)[1])
    done = len(rows(pictures / "metadata.csv"))
    assert done >= 6
    assert done + left == 308
