"""A run that is killed again and again ends in the very file of a run that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLS = int(os.environ.get("LORA_SCRIPTS_KILLS", "50"))


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.fault(26)
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_run_killed_at_random_moments_ends_in_the_same_bytes(settings: Callable[..., Any], tmp_path: Path) -> None:
    unbroken = settings(
        output_dir=str(tmp_path / "unbroken" / "run"),
        max_steps=40,
        save_steps=1,
        keep_checkpoints=2,
        lora_dropout=0.1,
        caption_dropout=0.2,
        flip=True,
        save_precision="fp32",
    )
    previews = {"sample_every": 3, "sample_prompts": ["a red cat"], "sample_steps": 1}
    plan = {
        "unbroken": unbroken,
        "free_changes": [{}, {"num_workers": 1}, {"num_workers": 3}, previews, previews | {"num_workers": 2}],
        "folder": str(tmp_path / "killed"),
        "log": str(tmp_path / "lives.log"),
        "kills": KILLS,
        "life": 0.4,
        "seed": 7,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("attempts.py")), str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert "failed" not in told, f"{told}\n{(tmp_path / 'lives.log').read_text('utf-8', 'replace')[-3000:]}"
    print(told)
    assert told["kills"] == KILLS
    assert told["while saving"] > 0
    expected = (tmp_path / "unbroken" / "run" / "run.safetensors").read_bytes()
    for file in told["finished"]:
        assert Path(file).read_bytes() == expected, file
        left = {path.name for path in Path(file).parent.iterdir()}
        assert not {name for name in left if name.endswith((".partial", ".tmp"))}, left
        for line in (Path(file).parent / "record.jsonl").read_text("utf-8").splitlines():
            assert line == "" or json.loads(line)
