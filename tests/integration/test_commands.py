"""The commands as a user types them: doors, exit codes, messages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_scripts.cli import main

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "peft", "pydantic")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        check=False,
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lora_scripts.cli import build_parser\nbuild_parser().format_help()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = run("-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}", cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("command", ["demo", "label", "check", "train", "sample", "targets", "settings"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"lora-scripts {command}" in capsys.readouterr().out


def test_train_py_runs_from_any_folder_and_ends_well(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(settings(max_steps=50)), "utf-8")
    done = run(str(ROOT / "train.py"), "--config", "my.yaml", "--set", "max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "run.safetensors").is_file()
    assert "<lora:run:0.8>" in done.stdout


@pytest.mark.fault(21)
def test_mistake_in_the_settings_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train_data_dir: pictures\nbase_model: x.safetensors\noutput_dir: out\nlora_rnak: 8\n", "utf-8")
    done = run(str(ROOT / "train.py"), "--config", "my.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "my.yaml line 4: lora_rnak: no such setting. Did you mean lora_rank?"
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(22)
def test_model_that_is_a_web_page_is_exit_code_2_without_traceback(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "v1-5-pruned.safetensors"
    page.write_text("<!DOCTYPE html><html><body>Access denied</body></html>")
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(settings(base_model=str(page))), "utf-8")
    assert main(["train", "--config", str(path)]) == 2
    message = capsys.readouterr().err
    assert "v1-5-pruned.safetensors" in message
    assert "Traceback" not in message


def test_settings_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "rank"]) == 0
    assert "lora_rank  (8)" in capsys.readouterr().out


def test_targets_are_listed(tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", str(tiny_sd_folder)]) == 0
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in capsys.readouterr().out


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md", "docs/use-language-lora.md"])
def test_every_command_in_the_readme_is_understood(readme: str) -> None:
    from lora_scripts.cli import build_parser

    text = (ROOT / readme).read_text("utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    ours = [
        line.partition("  #")[0]
        for line in lines
        if line.startswith("lora-scripts") or "&& lora-scripts" in line or "train.py" in line or "auto_label.py" in line
    ]
    assert len(ours) >= 4
    doors = {"python train.py": ["train"], "python tools/auto_label.py": ["label"], "lora-scripts": []}
    import shlex

    for line in ours:
        command = line.rpartition("&& ")[2]
        start, door = next((start, door) for start, door in doors.items() if command.startswith(start))
        build_parser().parse_args(door + shlex.split(command.removeprefix(start)))


def test_readme_shows_the_test_command_that_ci_runs() -> None:
    command = 'pip install ".[test]" && pytest'
    for readme in ("README.md", "README.zh-CN.md"):
        assert command in (ROOT / readme).read_text("utf-8")
    assert "pytest" in (ROOT / ".ci" / "run").read_text("utf-8")
