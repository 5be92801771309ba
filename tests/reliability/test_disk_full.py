"""A disk without room, made real by the system's own limit on the size of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save

from helpers import commands

if sys.platform == "win32":
    pytest.skip("no limit on file sizes there", allow_module_level=True)

import resource

Settings = Callable[..., dict[str, Any]]


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Within the block no file of this process grows beyond `num_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def result(folder: Path) -> bytes:
    return save(load_file(folder / "run.safetensors"))


def run(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code, _, err = commands.train(values, tmp_path, capsys)
    return code, err


@pytest.mark.fault(3)
def test_disk_full_at_a_checkpoint_keeps_the_older_ones_and_the_run_goes_on_when_there_is_room(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = settings(output_dir=str(tmp_path / "whole" / "run"), lora_rank=4)
    assert run(whole, tmp_path, capsys)[0] == 0
    cut = settings(output_dir=str(tmp_path / "cut" / "run"), lora_rank=4)
    assert run(cut | {"max_steps": 6}, tmp_path, capsys)[0] == 0
    folder = tmp_path / "cut" / "run"
    for number in (4, 6):  # as if the run had only come to step 2
        for path in (folder / f"checkpoint-{number}").iterdir():
            path.unlink()
        (folder / f"checkpoint-{number}").rmdir()
    room = (folder / "checkpoint-2" / "optimizer.safetensors").stat().st_size - 1
    before = {path.name: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}

    with largest_file(room):
        code, err = run(cut, tmp_path, capsys)
    assert code == 2
    assert "needs" in err
    assert "MB" in err
    assert str(folder) in err
    assert {path.name: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()} == before
    assert not list(folder.glob("checkpoint-4*"))

    assert run(cut, tmp_path, capsys)[0] == 0
    assert result(folder) == result(tmp_path / "whole" / "run")


@pytest.mark.fault(4)
@pytest.mark.parametrize("name", ["train.log", "record.jsonl"])
def test_disk_full_at_a_log_ends_in_plain_words_and_leaves_no_half_line(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    values = settings(output_dir=str(tmp_path / "run"))
    assert run(values | {"max_steps": 3, "save_steps": 1}, tmp_path, capsys)[0] == 0
    log = tmp_path / "run" / name
    with log.open("ab") as file:  # the log itself is what has grown beyond the room
        file.write(b'{"event": "note", "level": "info", "step": 0, "text": "x"}\n' * 20_000)
    values |= {"output_dir": str(tmp_path / "run"), "max_steps": 3, "save_steps": 1}
    with largest_file(log.stat().st_size + 10):
        code, err = run(values, tmp_path, capsys)
    assert code == 2
    assert "no room left on the disk" in err
    assert name in err
    lines = log.read_bytes()
    assert lines.endswith(b"\n")
    if name == "record.jsonl":
        assert all(json.loads(line) for line in lines.splitlines())
    assert run(values, tmp_path, capsys)[0] == 0


@pytest.mark.fault(14)
def test_a_worker_that_fails_ends_the_run_and_the_same_command_goes_on_to_the_same_result(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_scripts.data import images

    whole = settings(output_dir=str(tmp_path / "whole" / "run"), cache_dir=str(tmp_path / "one"))
    assert run(whole, tmp_path, capsys)[0] == 0
    cut = settings(output_dir=str(tmp_path / "cut" / "run"), cache_dir=str(tmp_path / "two"), num_workers=3)
    honest, read = images.read_image, []

    def dies(path: Path, *arguments: Any, **named: Any) -> Any:
        read.append(path)
        if len(read) == 5:
            raise MemoryError("a thread without memory")
        return honest(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(images, "read_image", dies)
        with pytest.raises(MemoryError):
            run(cut, tmp_path, capsys)
    assert not list((tmp_path / "cut" / "run").glob("checkpoint-*"))
    assert run(cut, tmp_path, capsys)[0] == 0
    assert result(tmp_path / "cut" / "run") == result(tmp_path / "whole" / "run")
