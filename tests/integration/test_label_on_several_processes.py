"""Captions on two processes started by torchrun: the table of one, whatever ends on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import draw_pictures
from lora_scripts.captioners.part_sheet import PartSheet
from lora_scripts.captioners.side_file import LabelRecord

ROOT = Path(__file__).parents[2]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def label(folder: Path, launcher: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(ROOT / "tools/auto_label.py"), "--input", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def unlabelled(folder: Path, count: int) -> Path:
    draw_pictures(folder, count)
    (folder / "metadata.csv").unlink()
    return folder


def test_two_processes_write_the_table_that_one_writes(tmp_path: Path) -> None:
    one, two = unlabelled(tmp_path / "one", 9), unlabelled(tmp_path / "two", 9)
    broken = (two / "01.png").read_bytes()[:150]
    for folder in (one, two):
        (folder / "broken.png").write_bytes(broken)
    alone, together = label(one, []), label(two, TWO)
    assert alone.returncode == 3, alone.stderr  # one picture is broken
    assert (two / "metadata.csv").read_text("utf-8") == (one / "metadata.csv").read_text("utf-8")
    assert "9 captions written" in together.stdout
    assert together.stdout.count("  broken.png: ") == 1
    assert not list(two.glob("*.part-*"))


def test_captions_of_a_process_that_was_broken_off_are_taken_over(tmp_path: Path) -> None:
    folder = unlabelled(tmp_path / "pictures", 3)
    sheet = PartSheet(folder, folder / "metadata.csv", print)
    sheet.journal(1)
    sheet.put([LabelRecord("01.png", "a cat of the other process", "a cat of the other process")])
    result = label(folder, [])
    assert result.returncode == 0, result.stderr
    assert "Recovered from processes that were broken off: captions of 1 picture" in result.stdout
    assert "01.png,a cat of the other process" in (folder / "metadata.csv").read_text("utf-8")
    assert not list(folder.glob("*.part-*"))
