"""A finished file that is not what was trained: the run fails, and nothing calls it complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import commands
from lora_scripts import finish

Settings = Callable[..., dict[str, Any]]


def fails(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a run whose export fails; the checkpoints are whole and everything says failed."""
    code, out, err = commands.train(values, tmp_path, capsys)
    run = tmp_path / "run"
    log = (run / "train.log").read_text("utf-8")
    assert code == 2
    assert "failed: " in err
    assert "failed: " in log
    assert "Use it:" not in out
    assert "finished;" not in log
    assert not (run / "report.html").exists()
    assert not (run / "run.json").exists()
    assert not (run / "run.safetensors").exists()
    assert (run / "checkpoint-6" / "run-6.safetensors").is_file()
    return err


def spoil(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]) -> None:
    """The disk gives back something else than was written to the finished file."""
    honest = finish.write_lora

    def write(path: Path, *arguments: Any, **more: Any) -> Any:
        written = honest(path, *arguments, **more)
        if path.name == "run.safetensors":
            damage(path)
        return written

    monkeypatch.setattr(finish, "write_lora", write)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "the finished file cannot be read back"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "the finished file cannot be read back"),
        (lambda path: path.write_bytes(b""), "the finished file cannot be read back"),
        (flip_a_byte, "differ from the trained ones by"),
    ],
    ids=["gone", "cut", "empty", "flipped"],
)
def test_file_that_does_not_come_back_as_written_fails_the_run(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    values = settings()
    with monkeypatch.context() as patch:
        spoil(patch, damage)
        assert message in fails(values, tmp_path, capsys)
    # With the disk in order again, the same command exports without training anew.
    code, out, err = commands.train(values, tmp_path, capsys)
    assert code == 0, err
    assert "Use it:" in out
    assert "step 1/6" not in out


@pytest.mark.fault(28)
def test_training_that_changes_nothing_fails_the_run(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Weights of 1e-12 are zero in float16.
    told = fails(settings(learning_rate=1e-12), tmp_path, capsys)
    assert "the LoRA changes nothing, every one of its" in told
    assert "higher learning_rate" in told
