"""Language models with the other kinds of adapter: whole runs, whose finished folder is a plain LoRA that PEFT reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import train as train_by_command
from helpers.seen import StopAfter, train
from helpers.tiny_causal_lms import probe
from lora_scripts.adapters.lora import attach
from lora_scripts.config import RunConfig
from lora_scripts.export.reader import read_lora_file

Settings = Callable[..., dict[str, Any]]
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"adapter": "dora"},
    "loha": {"adapter": "loha"},
    "lokr": {"adapter": "lokr", "lokr_factor": 2},
    "oft": {"adapter": "oft", "oft_block_size": 4},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def values(kind: str, language_settings: Settings) -> dict[str, Any]:
    found = language_settings(**KINDS[kind], save_precision="fp32", keep="last")
    for setting in ("lora_rank", "lora_alpha") if kind == "oft" else ():
        del found[setting]
    return found


def test_peft_reads_the_folder_with_the_logits_that_were_trained(
    kind: str, values: dict[str, Any], tiny_language_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    seen = train(values)
    out = Path(values["output_dir"])
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    with torch.no_grad():
        plain = base(probe()).logits
    trained = trained_logits(base, kind, values, out / "checkpoint-6" / "adapter.safetensors")
    with torch.no_grad():
        read = PeftModel.from_pretrained(base, out / "run")(probe()).logits
    assert float((trained - plain).norm()) > 1e-2
    assert float((read - trained).norm()) <= 0.1 * float((trained - plain).norm())
    (rank,) = {lora.rank for lora in read_lora_file(out / "run").weights.values()}
    assert any(f"baked into a plain LoRA of rank {rank}" in note for note in seen.notes)


def trained_logits(model: Any, kind: str, values: dict[str, Any], checkpoint: Path) -> torch.Tensor:
    """What the model says with the adapter itself, as the last checkpoint has it."""
    form = RunConfig.model_validate(values)
    adapter = attach(
        {"language_model": model},
        {"language_model": TARGETS},
        kind=kind,
        rank=form.oft_block_size if kind == "oft" else form.lora_rank,
        alpha=form.alpha,
        lokr_factor=2,
    )
    adapter.load_state_dict(load_file(checkpoint))
    with torch.no_grad():
        logits: torch.Tensor = model(probe()).logits
    adapter.detach()
    return logits


def test_run_that_was_stopped_ends_in_the_same_bits(values: dict[str, Any], tmp_path: Path) -> None:
    whole, broken = (values | {"output_dir": str(tmp_path / name / "run")} for name in ("whole", "broken"))
    train(whole)
    train(broken, StopAfter(3))
    assert not (tmp_path / "broken" / "run" / "run").exists()
    train(broken)
    for file in ("run/adapter_model.safetensors", "checkpoint-6/adapter.safetensors"):
        ours, theirs = (load_file(Path(run["output_dir"]) / file) for run in (whole, broken))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_loss_falls(values: dict[str, Any]) -> None:
    found = [loss for report in train(values | {"max_steps": 30, "save_steps": 30}).reports for loss in report.losses]
    assert sum(found[-5:]) < 0.95 * sum(found[:5])


def test_form_that_no_loader_of_language_models_reads_is_refused(
    language_settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = train_by_command(language_settings(adapter="lokr", export_as="own"), tmp_path, capsys)
    assert code == 2
    assert "export_as" in err
    assert not (tmp_path / "run").exists()
