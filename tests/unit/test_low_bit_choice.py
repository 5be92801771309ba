"""What `low_bit_matmul` comes to on a device, and the one message where that cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_scripts import low_bit_choice
from lora_scripts.config import RunConfig
from lora_scripts.errors import ConfigError
from lora_scripts.low_bit_choice import choose_low_bit
from lora_scripts.models import low_bit
from lora_scripts.training.events import Events


def config(tmp_path: Path, **changes: Any) -> RunConfig:
    values = {
        "train_data_dir": tmp_path,
        "base_model": "builtin:mini-sd",
        "output_dir": tmp_path / "run",
        "device": "cpu",
    }
    return RunConfig.model_validate(values | changes)


def chosen(tmp_path: Path, kind: str, **changes: Any) -> str:
    return choose_low_bit(config(tmp_path, low_bit_matmul=kind, **changes), Events()).low_bit_matmul


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch see a CUDA GPU of a compute capability; what is tried on it runs on the CPU."""

    def of(*capability: int) -> None:
        monkeypatch.setattr(low_bit_choice, "choose_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        tried = low_bit_choice._try_out
        monkeypatch.setattr(low_bit_choice, "_try_out", lambda kind, device: tried(kind, torch.device("cpu")))

    return of


@pytest.fixture
def no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(low_bit, "_IMPORTED", [])


@pytest.mark.parametrize(
    ("capability", "kind"), [((9, 0), "fp8"), ((8, 9), "fp8"), ((8, 6), "int8"), ((7, 5), "int8"), ((7, 0), "none")]
)
def test_auto_is_what_the_graphics_card_has(tmp_path: Path, card: Any, capability: tuple[int, int], kind: str) -> None:
    pytest.importorskip("torchao")
    card(*capability)
    assert chosen(tmp_path, "auto") == kind


def test_auto_on_a_cpu_is_none_and_needs_no_torchao(tmp_path: Path, no_torchao: None) -> None:
    assert chosen(tmp_path, "auto") == "none"


def test_auto_gives_way_to_a_setting_it_cannot_be_combined_with(tmp_path: Path, card: Any) -> None:
    card(9, 0)
    assert chosen(tmp_path, "auto", block_swap=2) == "none"


def test_auto_without_torchao_is_none_on_any_card(tmp_path: Path, card: Any, no_torchao: None) -> None:
    card(9, 0)
    assert chosen(tmp_path, "auto") == "none"


def test_fp8_on_an_older_card_is_refused_with_the_ways_on(tmp_path: Path, card: Any) -> None:
    card(8, 6)
    with pytest.raises(ConfigError, match=r"fp8: needs .* capability 8\.9 .* has 8\.6\. Set int8, auto or none"):
        chosen(tmp_path, "fp8")


def test_without_torchao_the_message_says_how_to_install_it(tmp_path: Path, no_torchao: None) -> None:
    with pytest.raises(ConfigError, match=r'int8 needs the package torchao.*pip install "lora-scripts\[lowbit\]"'):
        chosen(tmp_path, "int8")


def test_a_device_without_the_kernels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise NotImplementedError("_int_mm is not implemented for this device\nmore")

    monkeypatch.setattr(low_bit_choice, "_try_out", missing)
    with pytest.raises(ConfigError, match=r"int8: cannot be done on cpu here \(_int_mm is not .* device\)\. Set"):
        chosen(tmp_path, "int8")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_swap": 2}, "block_swap"),
        ({"task_type": "text-generation", "quantization": "nf4"}, "quantization: nf4"),
        ({"task_type": "text-generation", "objective": "dpo"}, "objective: dpo"),
    ],
)
def test_what_excludes_it_is_refused_before_anything_is_read(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"low_bit_matmul: int8: not with {reason}"):
        config(tmp_path, low_bit_matmul="int8", **changes)
