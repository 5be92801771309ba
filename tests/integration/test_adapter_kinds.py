"""Whole runs with every kind of adapter: resumed to the bit, and a finished file that diffusers reads as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules import get_module, make_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.seen import StopAfter, train
from lora_scripts.adapters import pissa
from lora_scripts.attaching import attach_adapter
from lora_scripts.config import RunConfig
from lora_scripts.errors import ExportError
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.reader import read_changes
from lora_scripts.export.verify_own import verify_own_file
from lora_scripts.families.latent_diffusion import LatentDiffusion
from lora_scripts.models.stable_diffusion import StableDiffusionParts
from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA
from lora_scripts.training.events import Events
from unit.sampling.tiny_sd import pipeline, tiny_parts

Settings = Callable[..., dict[str, Any]]

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "pissa": {"lora_init": "pissa"},
    "dora": {"adapter": "dora"},
    "lora+": {"lora_plus_ratio": 4},
    "dora, rslora, lora+": {"adapter": "dora", "use_rslora": True, "lora_plus_ratio": 4},
    "locon": {"adapter": "locon", "conv_rank": 1},
    "ranks and rates by block": {"block_ranks": {"unet.mid": 1, "unet.up": 4}, "block_rates": {"unet.mid": 2e-3}},
}
OTHER_KINDS: dict[str, dict[str, Any]] = {
    "loha": {"adapter": "loha"},
    "lokr": {"adapter": "lokr", "lokr_factor": 2},
    "lokr with convolutions": {"adapter": "lokr", "conv_rank": 1},
    "oft": {"adapter": "oft", "oft_block_size": 4},
    "dora in its own form": {"adapter": "dora", "export_as": "own"},
}
every_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


def fitting(settings: Settings) -> Settings:
    """The same, without the ranks where an adapter has none."""

    def make(**changes: Any) -> dict[str, Any]:
        values = settings(**changes)
        return {
            k: v
            for k, v in values.items()
            if changes.get("adapter") != "oft" or (not k.startswith("lora_r") and k != "lora_alpha")
        }

    return make


def files_equal(left: Path, right: Path) -> bool:
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("changes", [*KINDS.values(), *OTHER_KINDS.values()], ids=[*KINDS, *OTHER_KINDS])
def test_stopped_run_resumes_to_the_same_bits(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"lora_dropout": 0.1, "save_precision": "fp32", "max_steps": 4, "keep": "last", **changes}
    settings = fitting(settings)
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
        self.conv_targets, self.block_roles = LatentDiffusion.conv_targets, LatentDiffusion.block_roles


def output(parts: StableDiffusionParts) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 4, 4, 4, generator=generator)
    ids = parts.tokenizer("a red fox", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = parts.text_encoder(ids).last_hidden_state.expand(2, -1, -1)
        out: Tensor = parts.unet(latents, torch.tensor([10, 900]), embeds, return_dict=False)[0]
        return out


PLAIN = {
    f"{name}, plain": changes | {"export_as": "plain"} for name, changes in OTHER_KINDS.items() if "own" not in name
}


@pytest.mark.parametrize("changes", [*KINDS.values(), *PLAIN.values()], ids=[*KINDS, *PLAIN])
def test_finished_file_does_in_diffusers_what_was_trained(
    settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    targets = {"target_modules": ["to_q", "to_v", "proj_in", "conv1"]}
    values = fitting(settings)(save_precision="fp32", keep="last", **targets, **changes)
    seen = train(values)
    assert any("effect compared" in note for note in seen.notes)
    trained = after(values, tmp_path / "run")
    plain, loaded = tiny_parts(), tiny_parts()
    pipeline(loaded).load_lora_weights(str(tmp_path / "run" / "run.safetensors"))
    change = output(trained) - output(plain)
    assert change.abs().max() > 1e-3
    exact = changes.get("adapter", "lora") in ("lora", "locon", "loha") or changes.get("conv_rank")
    baked = any("of the trained change is not in it" in note for note in seen.notes)
    assert (output(loaded) - output(trained)).norm() < (0.15 if baked else 1e-3) * change.norm()
    assert baked or exact or changes["adapter"] == "lokr"
    assert files_equal(tmp_path / "run" / "run.safetensors", tmp_path / "run" / "checkpoint-6" / "run-6.safetensors")


def after(values: dict[str, Any], run: Path) -> StableDiffusionParts:
    """The tiny model with the run's adapter as it was trained."""
    trained = tiny_parts()
    adapter = attach_adapter(_Family(trained), RunConfig.model_validate(values | {"fuse_layers": False}), Events())  # type: ignore[arg-type]
    adapter.load_state_dict(load_file(run / "checkpoint-6" / "adapter.safetensors"))
    return trained


@pytest.mark.parametrize("changes", OTHER_KINDS.values(), ids=OTHER_KINDS.keys())
def test_file_of_its_own_kind_does_in_lycoris_what_was_trained(
    settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = fitting(settings)(save_precision="fp32", keep="last", **changes)
    seen = train(values)
    assert any("effect compared" in note for note in seen.notes)
    file = tmp_path / "run" / "run.safetensors"
    trained, plain, loaded = after(values, tmp_path / "run"), tiny_parts(), tiny_parts()
    state, at_work = load_file(file), []
    with torch.no_grad():
        for path, layer in loaded.unet.named_modules():
            name = f"lora_unet_{path.replace('.', '_')}"
            if any(key.startswith(f"{name}.") for key in state):
                kind, parts = get_module(state, name)
                # At work, not merged: its merging multiplies LoHa and LoKr by their scale twice.
                at_work.append(make_module(kind, parts, name, layer).eval())
                at_work[-1].apply_to()
    change = output(trained) - output(plain)
    assert change.abs().max() > 1e-3
    assert (output(loaded) - output(trained)).norm() < 2e-3 * change.norm()
    components = {"unet": plain.unet, "text_encoder": plain.text_encoder}
    read, base = read_changes(file, layer_shapes(components)), output(plain)
    with LoRASet(components, [WeightedLoRA(read.weights)]):
        assert (output(plain) - output(trained)).norm() < 2e-3 * change.norm()
    assert torch.equal(output(plain), base)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["ss_network_module"] == "lycoris.kohya"
    algo = {"dora": "locon", "oft": "diag-oft"}.get(changes["adapter"], changes["adapter"])
    assert f'"algo": "{algo}"' in header["ss_network_args"]


def test_damage_to_a_file_of_its_own_kind_is_found(settings: Settings, tmp_path: Path) -> None:
    values = settings(adapter="loha", keep="last", max_steps=2)
    train(values)
    family = _Family(tiny_parts())
    adapter = attach_adapter(family, RunConfig.model_validate(values | {"fuse_layers": False}), Events())  # type: ignore[arg-type]
    adapter.load_state_dict(load_file(tmp_path / "run" / "checkpoint-2" / "adapter.safetensors"))
    file = tmp_path / "run" / "run.safetensors"
    assert verify_own_file(file, adapter.weights(), adapter.base_weight).relative_error < 2e-3
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("hada_w2_a"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file)
    with pytest.raises(ExportError, match="hada_w2_a is not what was trained"):
        verify_own_file(file, adapter.weights(), adapter.base_weight)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ExportError, match="missing"):
        verify_own_file(file, adapter.weights(), adapter.base_weight)


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


def test_each_block_has_its_rate(settings: Settings) -> None:
    rates = {"unet.mid": 1e-3, "unet.up": 5e-3}
    reports = train(settings(block_rates=rates, lr_scheduler="constant", max_steps=2)).reports
    assert reports[-1].learning_rates == {"unet": 1e-2, **rates}
