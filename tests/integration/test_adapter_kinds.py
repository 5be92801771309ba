"""Whole runs with every kind of adapter: resumed to the bit, and a finished file that diffusers reads as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from helpers.seen import StopAfter, train
from lora_scripts.adapters import pissa
from lora_scripts.attaching import attach_adapter
from lora_scripts.config import RunConfig
from lora_scripts.models.stable_diffusion import StableDiffusionParts
from lora_scripts.training.events import Events
from unit.sampling.tiny_sd import pipeline, tiny_parts

Settings = Callable[..., dict[str, Any]]

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "pissa": {"lora_init": "pissa"},
    "dora": {"adapter": "dora"},
    "lora+": {"lora_plus_ratio": 4},
    "dora, rslora, lora+": {"adapter": "dora", "use_rslora": True, "lora_plus_ratio": 4},
}
every_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


def files_equal(left: Path, right: Path) -> bool:
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@every_kind
def test_stopped_run_resumes_to_the_same_bits(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"lora_dropout": 0.1, "save_precision": "fp32", "max_steps": 4, "keep": "last", **changes}
    whole = settings(output_dir=str(tmp_path / "a" / "run"), **more)
    train(whole)
    broken = settings(output_dir=str(tmp_path / "b" / "run"), **more)
    train(broken, StopAfter(1))
    assert not (tmp_path / "b" / "run" / "run.safetensors").exists()
    # Another machine may find other singular vectors; those of the first one are in the checkpoint.
    first = pissa.principal_part
    monkeypatch.setattr(pissa, "principal_part", lambda *args: tuple(-1.25 * part for part in first(*args)))
    train(broken)
    for file in ("run.safetensors", "checkpoint-4/adapter.safetensors", "checkpoint-4/optimizer.safetensors"):
        assert files_equal(tmp_path / "a" / "run" / file, tmp_path / "b" / "run" / file), file


class _Family:
    """As much of a family as the adapter is put into."""

    def __init__(self, parts: StableDiffusionParts) -> None:
        self.components = {"unet": parts.unet, "text_encoder": parts.text_encoder}
        self.default_targets = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}


def output(parts: StableDiffusionParts) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 4, 4, 4, generator=generator)
    ids = parts.tokenizer("a red fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = parts.text_encoder(ids).last_hidden_state.expand(2, -1, -1)
        out: Tensor = parts.unet(latents, torch.tensor([10, 900]), embeds, return_dict=False)[0]
        return out


@every_kind
def test_finished_file_does_in_diffusers_what_was_trained(
    settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = settings(
        save_precision="fp32", keep="last", target_modules=["to_q", "to_v", "proj_in", "conv1"], **changes
    )
    seen = train(values)
    assert any("effect compared" in note for note in seen.notes)
    run = tmp_path / "run"
    plain, trained, loaded = tiny_parts(), tiny_parts(), tiny_parts()
    adapter = attach_adapter(_Family(trained), RunConfig.model_validate(values), Events())  # type: ignore[arg-type]
    adapter.load_state_dict(load_file(run / "checkpoint-6" / "adapter.safetensors"))
    pipeline(loaded).load_lora_weights(str(run / "run.safetensors"))
    change = output(trained) - output(plain)
    assert change.abs().max() > 1e-3
    allowed = 0.1 if changes.get("adapter") == "dora" else 1e-3
    assert (output(loaded) - output(trained)).norm() < allowed * change.norm()
    assert files_equal(run / "run.safetensors", run / "checkpoint-6" / "run-6.safetensors")


@pytest.mark.parametrize(
    ("changes", "rank", "alpha"),
    [
        ({"use_rslora": True}, "2", str(3 * 2**0.5)),
        ({"lora_init": "pissa"}, "4", "6"),
        ({"lora_plus_ratio": 4}, "2", "3"),
    ],
    ids=["rslora", "pissa", "lora+"],
)
def test_header_says_the_rank_and_alpha_of_the_file(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], rank: str, alpha: str
) -> None:
    train(settings(max_steps=1, **changes))
    with safe_open(tmp_path / "run" / "run.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == (rank, alpha)


def test_baked_dora_tells_its_error(settings: Settings) -> None:
    notes = train(settings(adapter="dora", max_steps=2)).notes
    (line,) = [note for note in notes if "DoRA baked" in note]
    assert "of the trained change is not in it (Frobenius norm" in line


def test_each_matrix_of_lora_plus_has_its_rate(settings: Settings) -> None:
    reports = train(settings(lora_plus_ratio=4, lr_scheduler="constant", max_steps=2)).reports
    assert reports[-1].learning_rates == {"unet": 1e-2, "unet_lora_B": 4e-2}
