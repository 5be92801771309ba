"""What `lora-scripts sample` refuses before any model is read."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from lora_scripts.errors import ConfigError
from lora_scripts.sampling.command import add_arguments, run


def call(*options: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["--base-model", "builtin:mini-sd", *options]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "Nothing to render"),
        (["--prompts", "nowhere.txt"], r"nowhere\.txt: cannot be read"),
        (["--prompt", "a", "--steps", "0"], "--steps 0: must be between 1 and 200"),
        (["--prompt", "a", "--count", "0"], "--count 0"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size 0"),
        (["--prompt", "a", "--cfg", "nan"], "--cfg nan: must be between 1 and 100"),
        (["--prompt", "a", "--seed", "-1"], "--seed -1: must be a whole number"),
        (["--prompt", "a", "--size", "512x"], "--size 512x: write a width and a height"),
        (["--prompt", "a", "--weights", "0,1"], "--weights has no effect without --checkpoints"),
        (["--prompt", "a", "--checkpoints", "x", "--weights", "0,much"], "'much' is not a number"),
        (["--prompt", "a", "--sampler", "DPM++ 3M"], r"no such sampler\. Did you mean dpm\+\+ 2m\?"),
        (["--prompt", "a", "--device", "abacus"], "abacus: no such device"),
    ],
)
def test_wrong_option_is_named(options: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=text):
        call(*options)
    assert not (tmp_path / "samples").exists()


def test_all_wrong_numbers_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        call("--prompt", "a", "--steps", "0", "--count", "0", "--size", "x")
    assert len(caught.value.faults) == 3


def test_file_of_prompts_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("狐狸".encode("gbk"))
    with pytest.raises(ConfigError, match=r"prompts\.txt: is not UTF-8"):
        call("--prompts", str(tmp_path / "prompts.txt"))


def test_command_is_declared_without_heavy_libraries() -> None:
    import subprocess
    import sys

    code = (
        "import argparse, sys\n"
        "from lora_scripts.sampling.command import add_arguments\n"
        "add_arguments(argparse.ArgumentParser())\n"
        "print(sorted({'torch', 'PIL', 'numpy', 'diffusers', 'transformers', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    source = str(Path(__file__).parents[3] / "src")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source})
    assert done.stdout.strip() == "[]", done.stderr
