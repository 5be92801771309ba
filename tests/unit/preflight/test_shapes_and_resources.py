from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_scripts.config import RunConfig
from lora_scripts.data.buckets import fit_into
from lora_scripts.data.dataset import Example
from lora_scripts.planning.trial_pass import largest_pass
from lora_scripts.preflight.check_resources import check_disk, check_step, predict, prediction_note
from lora_scripts.preflight.check_shapes import check_shapes
from lora_scripts.preflight.disk import OVERHEAD, DiskNeed, checkpoint_bytes, encoding_need, merge_by_disk, output_need
from lora_scripts.preflight.model_step import StepMeasurement
from lora_scripts.preflight.run_length import RunLength, run_length

SQUARE, WIDE = (512, 512), (704, 320)
STEP = StepMeasurement(SQUARE, wanted=4, fitted=4, seconds=2.0, peak_bytes=6 * 10**9, device_bytes=12 * 10**9)


def examples(*shapes: tuple[tuple[int, int], int], repeats: int = 1) -> list[Example]:
    """So many pictures of each shape."""
    made = []
    for shape, number in shapes:
        for _ in range(number):
            name = f"{len(made)}.png"
            made.append(Example(name, Path(name), shape, fit_into(shape, [shape]), "x", repeats, name))
    return made


def config(tmp_path: Path, **settings: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"train_data_dir": tmp_path, "base_model": "-", "output_dir": tmp_path / "run"} | settings
    )


def codes(found: list[Any]) -> list[str]:
    return [finding.code for finding in found]


def test_shapes_that_fill_their_batches_are_only_counted(tmp_path: Path) -> None:
    these = examples((SQUARE, 8), (WIDE, 4))
    settings = config(tmp_path, batch_size=4, epochs=10)
    found = check_shapes(these, settings, run_length(settings, these))
    assert codes(found) == ["steps"]
    assert found[0].text == "30 steps of batch 4, 3 per epoch; each picture is seen about 10 times."


def test_written_batch_above_the_epoch_is_red(tmp_path: Path) -> None:
    these = examples((SQUARE, 3))
    settings = config(tmp_path, batch_size=4)
    finding = check_shapes(these, settings, run_length(settings, these))[0]
    assert (finding.level, finding.code) == ("red", "batch-never-filled")
    assert codes(check_shapes(these, config(tmp_path), run_length(settings, these))) == ["steps"]


def test_shapes_below_a_batch_are_named(tmp_path: Path) -> None:
    these = examples((SQUARE, 4), (WIDE, 3), ((320, 704), 1))
    settings = config(tmp_path, batch_size=4)
    finding = check_shapes(these, settings, run_length(settings, these))[0]
    assert (finding.level, finding.code) == ("amber", "shapes-below-batch")
    assert "320x704 (1), 704x320 (3)" in finding.text
    assert len(finding.names) == 4


def test_very_uneven_repeats_are_named(tmp_path: Path) -> None:
    these = [*examples((SQUARE, 4), repeats=20), replace(examples((SQUARE, 1))[0], name="rare.png")]
    settings = config(tmp_path)
    finding = check_shapes(these, settings, run_length(settings, these))[0]
    assert (finding.code, finding.names) == ("repeats-uneven", ["rare.png"])


def test_run_length_leaves_out_what_is_held_out_and_what_is_done(tmp_path: Path) -> None:
    these = examples((SQUARE, 50))
    assert run_length(config(tmp_path, epochs=2, batch_size=4), these) == RunLength(12, 24)  # 4 of 50 held out
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    assert run_length(config(tmp_path, max_steps=50), these).to_do == 30


def test_largest_pass_is_the_one_with_most_pixels() -> None:
    these = examples((SQUARE, 1), (WIDE, 3))
    assert [e.fit.bucket for e in largest_pass(these, 4)] == [WIDE] * 3
    assert [e.fit.bucket for e in largest_pass(these, 1)] == [SQUARE]
    assert len(largest_pass(examples((SQUARE, 1), repeats=10), 4)) == 4


def test_disk_need_counts_checkpoints_that_are_kept_and_still_to_come(tmp_path: Path) -> None:
    settings = config(tmp_path, save_steps=100, max_steps=1000, sample_every=0)

    def need(settings: RunConfig, done: int = 0) -> int:
        return output_need(settings, RunLength(10, 1000, done), 1_000_000, 10, 0, SQUARE).num_bytes

    # AdamW: weights 4, moments 8, loadable file 2 bytes per weight.
    assert need(settings) == pytest.approx(10 * 14e6 + 2e6, rel=0.02)
    assert need(settings, done=800) == pytest.approx(2 * 14e6 + 2e6, rel=0.02)
    kept = settings.model_copy(update={"keep_checkpoints": 2})
    assert need(kept) == pytest.approx(4 * 14e6 + 2e6, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "prodigy"])
def test_predicted_checkpoint_is_as_large_as_a_written_one(tmp_path: Path, optimizer: str) -> None:
    import torch
    from safetensors.torch import save_file

    from lora_scripts.training.checkpoint import Checkpoint, save_checkpoint
    from lora_scripts.training.optimizers import ParameterGroup, make_optimizer, optimizer_state

    weights = torch.nn.Parameter(torch.randn(1000, 500))
    stepper = make_optimizer(optimizer, [ParameterGroup("unet", [weights], 1.0 if optimizer == "prodigy" else 1e-4)])
    weights.grad = torch.randn_like(weights)
    stepper.step()
    checkpoint = Checkpoint(1, {"weights": weights.detach()}, *optimizer_state(stepper), {}, {})

    def write_loadable(folder: Path) -> None:
        save_file({"weights": weights.detach().half()}, folder / "x-1.safetensors")

    folder = save_checkpoint(tmp_path, checkpoint, write_loadable)
    written = sum(file.stat().st_size for file in folder.iterdir())
    predicted = checkpoint_bytes(config(tmp_path, optimizer=optimizer), weights.numel(), 0)
    assert predicted == pytest.approx(written, rel=0.15)


def test_pissa_checkpoint_is_predicted_with_its_start_and_its_file_of_twice_the_rank(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    from lora_scripts.adapters.lora import attach
    from lora_scripts.export.kohya import to_kohya

    net = torch.nn.ModuleDict({"q": torch.nn.Linear(300, 200)})
    adapter = attach({"unet": net}, {"unet": ["q"]}, rank=64, alpha=64.0, init="pissa")
    loadable = save(to_kohya(adapter.weights(), None, torch.float16))
    written = len(save(adapter.state_dict())) + 8 * adapter.num_parameters + len(loadable)
    settings = config(tmp_path, lora_init="pissa", lora_rank=64)
    assert checkpoint_bytes(settings, adapter.num_parameters, 0) - OVERHEAD == pytest.approx(written, rel=0.02)


def test_encodings_that_are_there_need_no_room(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "a.safetensors").write_bytes(bytes(700))
    assert encoding_need(tmp_path, 10, 100).num_bytes == 300
    assert encoding_need(tmp_path, 5, 100).num_bytes == 0


def test_needs_on_one_disk_share_its_room(tmp_path: Path) -> None:
    merged = merge_by_disk([DiskNeed(tmp_path / "a" / "b", 60, 100), DiskNeed(tmp_path, 50, 100)])
    assert merged == [DiskNeed(tmp_path / "a" / "b", 110, 100)]
    assert [(f.level, f.code) for f in check_disk(merged)] == [("red", "disk-full")]


@pytest.mark.parametrize(("num_bytes", "expected"), [(50, []), (90, ["disk-tight"]), (101, ["disk-full"])])
def test_room_on_the_disk(num_bytes: int, expected: list[str]) -> None:
    assert codes(check_disk([DiskNeed(Path("/x"), num_bytes, 100)])) == expected


def test_step_that_fits_gives_no_finding() -> None:
    assert check_step(STEP) == []


@pytest.mark.parametrize(
    ("change", "level", "code"),
    [
        ({"fitted": 0}, "red", "out-of-memory"),
        ({"finite": False}, "red", "loss-not-finite"),
        ({"fitted": 2}, "amber", "batch-too-large"),
        ({"peak_bytes": 11_500_000_000}, "amber", "memory-tight"),
    ],
)
def test_step_that_does_not_go_well_is_found(change: dict[str, Any], level: str, code: str) -> None:
    assert [(f.level, f.code) for f in check_step(replace(STEP, **change))] == [(level, code)]


def test_time_follows_from_the_step(tmp_path: Path) -> None:
    settings, step = config(tmp_path, sample_every=0), replace(STEP, passes=3)
    prediction = predict(settings, RunLength(10, 100, 40), [DiskNeed(tmp_path, 1, 2)], step, 0)
    assert prediction.step_seconds == 6.0
    assert prediction.total_seconds == pytest.approx(60 * 6.0 * 1.025)
    halved = predict(settings, RunLength(10, 100), [DiskNeed(tmp_path, 1, 2)], replace(step, fitted=2), 0)
    assert halved.step_seconds == 12.0
    (note,) = prediction_note(prediction)
    assert note.text == "Predicted: about 6 min for 60 steps of 6 s, 6.0 GB of 12.0 GB memory, 0 MB disk (0 MB free)."
    assert predict(settings, RunLength(10, 100), [DiskNeed(tmp_path, 1, 2)], None, 0).total_seconds is None
