"""An output folder that cannot be written, that goes away, or that holds another run than the one asked for."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers import commands
from lora_scripts.config import RunConfig
from lora_scripts.errors import TrainingError
from lora_scripts.train_command import train_and_report
from lora_scripts.training.events import Listener

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def sealed_folder(tmp_path: Path) -> Path:
    """A folder in which this user may not make anything; root may write anywhere but in the kernel's own tree."""
    if os.name == "nt":
        pytest.skip("folders have no write bit there")
    if os.geteuid() == 0:
        if sys.platform != "linux":
            pytest.skip("root may write anywhere")
        return Path("/sys/kernel")
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o500)
    return folder


@pytest.mark.fault(5)
def test_sealed_output_folder_is_refused_before_anything_is_read(
    settings: Settings, pictures: Path, sealed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = commands.train(settings(output_dir=str(sealed_folder / "run")), tmp_path, capsys)
    assert code == 2
    assert "output_dir" in err
    assert "cannot be written" in err
    assert not (pictures / ".cache").exists()


class RemoveAt(Listener):
    """Removes the output folder after a step; with `put`, something else comes to stand there."""

    def __init__(self, step: int, folder: Path, put: str | None = None) -> None:
        self.step, self.folder, self.put = step, folder, put

    def ticked(self, step: int) -> None:
        if step == self.step:
            shutil.rmtree(self.folder)
            if self.put is not None:
                self.folder.write_text(self.put)


@pytest.mark.fault(5)
@pytest.mark.skipif(sys.platform == "win32", reason="open files keep a folder from being removed there")
@pytest.mark.parametrize("put", [None, "a file of somebody else"])
def test_folder_removed_during_the_run_ends_it_clearly_and_nothing_is_written_in_its_place(
    settings: Settings, tmp_path: Path, put: str | None
) -> None:
    values = settings()
    folder = Path(values["output_dir"])
    with pytest.raises(TrainingError, match=r"was removed while the run went on.*same command"):
        train_and_report(RunConfig.model_validate(values), more=[RemoveAt(3, folder, put)])
    if put is None:
        assert not folder.exists()
        assert train_and_report(RunConfig.model_validate(values)).complete
    else:
        assert folder.read_text() == put


@pytest.mark.fault(27)
def test_both_ways_on_that_a_refused_resume_names_work_as_written(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings()
    assert commands.train(values, tmp_path, capsys)[0] == 0
    first = load_file(tmp_path / "run" / "run.safetensors")
    changed = values | {"learning_rate": 1e-6, "max_steps": 2}
    code, _, err = commands.train(changed, tmp_path, capsys)
    assert code == 2
    assert "learning_rate: was 0.01, is now 1e-06" in err
    older = re.search(r"init_lora_weights: (\S+)", err)
    assert older is not None

    anew, on_it = tmp_path / "anew" / "run", tmp_path / "on-it" / "run"
    assert commands.train(changed | {"output_dir": str(anew)}, tmp_path, capsys)[0] == 0
    built = changed | {"output_dir": str(on_it), "init_lora_weights": older[1]}
    assert commands.train(built, tmp_path, capsys)[0] == 0

    def distance(folder: Path) -> float:
        """How far the file's upper matrices, which begin at zero in a new LoRA, lie from those of the first run."""
        now = load_file(folder / "run.safetensors")
        return sum(float((now[key] - first[key]).float().norm()) for key in first if "lora_up" in key)

    assert distance(on_it) < 0.1 * distance(anew)
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
