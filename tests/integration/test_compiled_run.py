"""A whole run through the compiler itself: its losses are the plain ones to rounding, and stopped and resumed it ends in the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.compilers import require_cpp_compiler
from helpers.seen import StopAfter, train

Settings = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    require_cpp_compiler()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def losses(seen: Any) -> list[float]:
    return [loss for report in seen.reports for loss in report.losses]


@pytest.mark.slow
def test_compiled_run_is_the_plain_one_to_rounding_and_resumes_to_the_bit(
    language_settings: Settings, tmp_path: Path, compiler: None
) -> None:
    def named(name: str, **changes: Any) -> dict[str, Any]:
        where = {"output_dir": str(tmp_path / name), "output_name": "run", "save_precision": "fp32"}
        return language_settings(**where, keep="last", mixed_precision="fp32", max_steps=4, **changes)

    plain, whole, broken = named("plain"), named("whole", compile=True), named("broken", compile=True)
    expected, seen = train(plain), train(whole)
    assert any(note.startswith("Compiling ") for note in seen.notes)
    torch.testing.assert_close(torch.tensor(losses(seen)), torch.tensor(losses(expected)), rtol=1e-4, atol=0)
    train(broken, StopAfter(3))
    torch._dynamo.reset()  # as in a process of its own
    resumed = train(broken)
    assert any(note.startswith("Resuming after step 3") for note in resumed.notes)
    ends = [load_file(Path(values["output_dir"]) / "run" / "adapter_model.safetensors") for values in (whole, broken)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
