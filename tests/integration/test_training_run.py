"""Whole runs on a tiny model: what they leave, how they resume, what they refuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.seen import StopAfter
from lora_scripts.config import RunConfig
from lora_scripts.errors import DataError, ModelError, ResumeError, TargetError
from lora_scripts.pipeline import Outcome
from lora_scripts.train_command import train_and_report
from lora_scripts.training.events import Listener, StepReport

Settings = Callable[..., dict[str, Any]]


class Losses(Listener):
    """Keeps every step's loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.notes: list[str] = []

    def stepped(self, report: StepReport) -> None:
        self.losses += report.losses

    def note(self, text: str, level: str = "info") -> None:
        self.notes.append(text)


def train(values: dict[str, Any], *more: Listener) -> Outcome:
    return train_and_report(RunConfig.model_validate(values), more=more)


def weights(values: dict[str, Any], name: str = "run") -> dict[str, torch.Tensor]:
    return load_file(Path(values["output_dir"]) / f"{name}.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.fault(7)
def test_run_leaves_everything_it_promises(settings: Settings, pictures: Path) -> None:
    (pictures / "broken.png").write_bytes((pictures / "01.png").read_bytes()[:200])
    table = pictures / "metadata.csv"
    table.write_text(table.read_text("utf-8") + 'broken.png,"half a picture"\n', "utf-8")
    values = settings(sample_every=3, sample_prompts=["a red cat"], sample_steps=2, trigger_word="sks")
    seen = Losses()
    outcome = train(values, seen)
    out = Path(values["output_dir"])
    assert outcome.complete
    assert len(seen.losses) == 6
    assert any("8 of 9 pictures train" in note for note in seen.notes)
    assert any("broken.png" in note for note in seen.notes)
    for name in ("run.safetensors", "run.json", "run.png", "train.log", "report.html", "record.jsonl", "checkpoint-6"):
        assert (out / name).exists(), name
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert (out / "checkpoint-4" / "run-4.safetensors").is_file()
    assert list((out / "logs").glob("events.out.tfevents.*"))
    assert json.loads((out / "run.json").read_text("utf-8"))["activation text"] == "sks"
    with safe_open(out / "run.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sd_v1"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "3")
    assert header["ss_num_train_images"] == "8"
    assert "broken.png" in (out / "report.html").read_text("utf-8")


def test_training_lowers_the_loss(settings: Settings) -> None:
    # Random weights have most to learn at the low noise levels that min-SNR would take out of the mean.
    seen = Losses()
    train(settings(max_steps=120, save_steps=120, batch_size=8, learning_rate=2e-2, min_snr_gamma=0), seen)
    assert sum(seen.losses[-10:]) < 0.97 * sum(seen.losses[:10])


@pytest.mark.fault(26)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_schedulefree"])
def test_stopped_run_resumes_to_the_same_bits(settings: Settings, tmp_path: Path, optimizer: str) -> None:
    changes = {
        "optimizer": optimizer,
        "lora_dropout": 0.1,
        "caption_dropout": 0.3,
        "flip": True,
        "save_precision": "fp32",
    }
    whole = settings(output_dir=str(tmp_path / "a" / "run"), **changes)
    train(whole)
    broken = settings(output_dir=str(tmp_path / "b" / "run"), **changes)
    assert not train(broken, StopAfter(1)).complete
    assert not train(broken, StopAfter(3)).complete
    assert train(broken).complete
    assert equal(weights(whole), weights(broken))


@pytest.mark.fault(6)
def test_resumed_run_falls_back_past_a_damaged_checkpoint(settings: Settings, tmp_path: Path) -> None:
    whole = settings(output_dir=str(tmp_path / "a" / "run"))
    train(whole)
    broken = settings(output_dir=str(tmp_path / "b" / "run"))
    train(broken, StopAfter(4))
    damaged = Path(broken["output_dir"]) / "checkpoint-4" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
    seen = Losses()
    assert train(broken, seen).complete
    assert any("checkpoint-4: optimizer.safetensors was changed or damaged" in note for note in seen.notes)
    assert equal(weights(whole), weights(broken))


def test_finished_run_run_again_gives_the_same_file(settings: Settings) -> None:
    values = settings()
    train(values)
    first = weights(values)
    seen = Losses()
    assert train(values, seen).complete
    assert seen.losses == []
    assert equal(first, weights(values))


@pytest.mark.fault(27)
def test_changed_setting_is_shown_and_refused(settings: Settings, pictures: Path) -> None:
    values = settings()
    train(values)
    with pytest.raises(ResumeError, match=r"(?s)learning_rate: was 0.01, is now 0.02.*init_lora_weights"):
        train(values | {"learning_rate": 0.02})


@pytest.mark.fault(27)
def test_changed_caption_is_shown_and_refused(settings: Settings, pictures: Path) -> None:
    values = settings()
    train(values)
    table = pictures / "metadata.csv"
    table.write_text(table.read_text("utf-8").replace("03.png,", "03.png,another "), "utf-8")
    with pytest.raises(ResumeError, match=r"03\.png: was"):
        train(values)


def test_batch_4_equals_2_x_2_accumulated(settings: Settings, tmp_path: Path) -> None:
    losses = {}
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        seen = losses[batch] = Losses()
        values = settings(
            output_dir=str(tmp_path / f"b{batch}"),
            batch_size=batch,
            gradient_accumulation_steps=accumulated,
            flip=True,
            caption_dropout=0.2,
        )
        train(values, seen)
    for batch in (2, 1):
        assert losses[batch].losses == pytest.approx(losses[4].losses, rel=2e-5)


@pytest.mark.fault(26)
def test_number_of_workers_and_previews_change_nothing(settings: Settings, tmp_path: Path) -> None:
    plain = settings(output_dir=str(tmp_path / "a" / "run"), num_workers=0, save_precision="fp32")
    busy = settings(
        output_dir=str(tmp_path / "b" / "run"),
        num_workers=3,
        cache_dir=str(tmp_path / "other-cache"),
        sample_every=1,
        sample_steps=1,
        sample_prompts=["x"],
        save_precision="fp32",
    )
    train(plain)
    train(busy)
    assert equal(weights(plain), weights(busy))


@pytest.mark.fault(15)
def test_edited_picture_is_encoded_anew_and_only_it(settings: Settings, pictures: Path, tmp_path: Path) -> None:
    import os

    from PIL import Image

    train(settings(output_dir=str(tmp_path / "a"), max_steps=1))
    entries = set((pictures / ".cache" / "latents").rglob("*.safetensors"))
    path = pictures / "02.png"
    before = path.stat()
    image = Image.open(path).convert("RGB")
    image.putpixel((10, 10), (1, 2, 3))
    image.save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    train(settings(output_dir=str(tmp_path / "b"), max_steps=1))
    assert len(set((pictures / ".cache" / "latents").rglob("*.safetensors")) - entries) == 1


def test_text_encoder_trains_too(settings: Settings) -> None:
    values = settings(train_text_encoder=True, text_encoder_learning_rate=5e-3, caption_shuffle=True)
    train(values)
    ups = {key: value for key, value in weights(values).items() if key.startswith("lora_te_") and "lora_up" in key}
    assert len(ups) == 8
    assert all(value.abs().max() > 0 for value in ups.values())


@pytest.mark.fault(27)
def test_training_goes_on_from_an_older_file(settings: Settings, tmp_path: Path) -> None:
    first = settings(output_dir=str(tmp_path / "a" / "run"))
    train(first)
    older = Path(first["output_dir"]) / "run.safetensors"
    second = settings(
        output_dir=str(tmp_path / "b" / "run"), init_lora_weights=str(older), max_steps=1, learning_rate=1e-9
    )
    train(second)
    old, new = weights(first), weights(second)
    assert old.keys() == new.keys()
    assert all(torch.allclose(old[key].float(), new[key].float(), atol=1e-3) for key in old)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_snr_gamma": 0},
        {"noise_offset": 0.1},
        {"prediction": "v_prediction", "zero_terminal_snr": True},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"optimizer": "lion", "learning_rate": 1e-4},
        {"optimizer": "adafactor"},
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"clip_skip": 2},
        {"lr_scheduler": "cosine_with_restarts", "lr_cycles": 2},
        {"buckets": False},
        {"target_modules": ["to_q", "proj_in", "ff.net.2"]},
        {"caption_shuffle": True, "caption_variants": 2},
        {"resolution": "128x64"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_option_trains_and_changes_the_result(settings: Settings, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = settings(output_dir=str(tmp_path / "a" / "run"), max_steps=3, save_steps=3, mixed_precision="fp32")
    train(plain)
    other = plain | {"output_dir": str(tmp_path / "b" / "run")} | changes
    assert train(other).complete
    assert all(bool(torch.isfinite(value).all()) for value in weights(other).values())
    if "gradient_checkpointing" not in changes and "caption_shuffle" not in changes:
        assert not equal(weights(plain), weights(other))


def test_no_folder_is_said_before_weights_are_read(settings: Settings) -> None:
    with pytest.raises(DataError, match="train_data_dir: nowhere: no such folder"):
        train(settings(train_data_dir="nowhere", base_model="missing.safetensors"))


def test_missing_model_is_said(settings: Settings) -> None:
    with pytest.raises(ModelError, match=r"missing\.safetensors"):
        train(settings(base_model="missing.safetensors"))


def test_target_that_matches_nothing_is_said(settings: Settings) -> None:
    with pytest.raises(TargetError, match="to_qq"):
        train(settings(target_modules=["to_q", "to_qq"]))


@pytest.mark.fault(21)
def test_rank_above_layer_size_is_said(settings: Settings) -> None:
    with pytest.raises(Exception, match="lora_rank"):
        train(settings(lora_rank=512))


def test_folder_without_usable_pictures_is_said(settings: Settings, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty"):
        train(settings(train_data_dir=str(empty)))


@pytest.mark.fault(5)
def test_file_in_place_of_the_output_folder_is_said(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(DataError, match=r"output_dir: .*cannot be written"):
        train(settings())


def written_before(folder: Path, *settings: str) -> None:
    """Makes a checkpoint what a version wrote that did not know these settings."""
    state = json.loads((folder / "state.json").read_text("utf-8"))
    for setting in settings:
        del state["identity"][setting]
    content = json.dumps(state).encode()
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_checkpoint_that_lacks_newer_settings_goes_on_with_their_defaults(settings: Settings, tmp_path: Path) -> None:
    values = settings(max_steps=4, save_steps=2)
    train(values, StopAfter(2))
    written_before(Path(values["output_dir"]) / "checkpoint-2", "ema_decay", "masked_loss")
    with pytest.raises(ResumeError, match=r"ema_decay: was 0\.0, is now 0\.9"):
        train(values | {"ema_decay": 0.9})
    seen = Losses()
    train(values, seen)
    assert any("Resuming after step 2" in note for note in seen.notes)
    unbroken = settings(max_steps=4, save_steps=2, output_dir=str(tmp_path / "unbroken" / "run"))
    train(unbroken)
    assert equal(weights(values), weights(unbroken))
