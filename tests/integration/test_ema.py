"""`ema_decay` in whole runs: the averaged weights are what is measured, shown, saved and finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from helpers.seen import StopAfter, train
from integration.test_anomalies import spoil
from lora_scripts.training import loop

Settings = Callable[..., dict[str, Any]]
EXACT = {"save_precision": "fp32", "buckets": False, "keep": "last"}


def file_of(values: dict[str, Any], step: int | None = None) -> dict[str, torch.Tensor]:
    out = Path(values["output_dir"])
    return load_file(
        out / "run.safetensors" if step is None else out / f"checkpoint-{step}" / f"run-{step}.safetensors"
    )


def raw(values: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """The weights that training went on with after a step."""
    return load_file(Path(values["output_dir"]) / f"checkpoint-{step}" / "adapter.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def watched(monkeypatch: pytest.MonkeyPatch, decay: float) -> list[EMAModel]:
    """diffusers' average of the adapter's weights, taken after every step that is taken."""
    kept: list[EMAModel] = []
    honest = loop.update_average

    def update(optimizer: torch.optim.Optimizer, step: int, value: float) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not kept:
            kept.append(EMAModel(parameters, decay=decay))
        kept[0].step(parameters)
        honest(optimizer, step, value)

    monkeypatch.setattr(loop, "update_average", update)
    return kept


def by_shape(tensors: Any) -> list[torch.Tensor]:
    return sorted(tensors, key=lambda tensor: (tuple(tensor.shape), float(tensor.sum())))


def test_finished_file_holds_diffusers_average_and_training_is_the_same(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = settings(output_dir=str(tmp_path / "a" / "run"), **EXACT)
    train(plain)
    theirs = watched(monkeypatch, 0.9)
    averaged = settings(output_dir=str(tmp_path / "b" / "run"), ema_decay=0.9, **EXACT)
    train(averaged)
    for step in (2, 4, 6):
        assert equal(raw(plain, step), raw(averaged, step))
    assert not equal(file_of(plain), file_of(averaged))
    assert equal(file_of(averaged), file_of(averaged, 6))
    matrices = [value for key, value in file_of(averaged).items() if not key.endswith(".alpha")]
    for ours, expected in zip(by_shape(matrices), by_shape(theirs[0].shadow_params), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("changes", [{}, {"adapter": "dora"}, {"lora_init": "pissa"}, {"optimizer": "lion"}])
def test_stopped_run_resumes_to_the_same_average(settings: Settings, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {"ema_decay": 0.9, "learning_rate": 1e-3, **EXACT, **changes}
    whole = settings(output_dir=str(tmp_path / "a" / "run"), **changes)
    train(whole)
    broken = settings(output_dir=str(tmp_path / "b" / "run"), **changes)
    train(broken, StopAfter(1))
    train(broken, StopAfter(3))
    train(broken)
    assert equal(file_of(whole), file_of(broken))
    assert equal(raw(whole, 6), raw(broken, 6))


def test_measurements_are_of_the_average(settings: Settings, tmp_path: Path) -> None:
    measured = {"validation_pictures": 2, "validate_every": 2, "save_precision": "fp32", "buckets": False}
    plain = train(settings(output_dir=str(tmp_path / "a" / "run"), **measured))
    values = settings(output_dir=str(tmp_path / "b" / "run"), ema_decay=0.9, **measured)
    averaged = train(values)
    assert averaged.validations[0] == plain.validations[0]
    assert averaged.validations[-1] != plain.validations[-1]
    # A run that does nothing but measure the file of that step finds the same.
    started = settings(
        output_dir=str(tmp_path / "c" / "run"), init_lora_weights=str(Path(values["output_dir"]) / "run.safetensors"),
        max_steps=1, save_steps=1, **measured,
    )  # fmt: skip
    last = Path(values["output_dir"]) / "checkpoint-6" / "run-6.safetensors"
    again = train(started | {"init_lora_weights": str(last), "validate_every": 1}).validations[0]
    assert again.loss == pytest.approx(averaged.validations[-1].loss, rel=1e-5)


def test_best_step_is_put_back_with_its_average(settings: Settings, tmp_path: Path, pictures: Path) -> None:
    # The rate climbs to far too much, on the layer whose output is the prediction itself.
    diverging = {"target_modules": ["conv_out"], "learning_rate": 5.0, "lr_scheduler": "constant_with_warmup"}
    values = settings(
        **diverging, warmup_steps=11, max_steps=12, save_steps=2, validation_pictures=4, validate_every=2, ema_decay=0.5,
        save_precision="fp32",
    )  # fmt: skip
    seen = train(values)
    (why,) = [note for note in seen.notes if "is the finished file" in note]
    assert "not the last one (12)" in why
    assert equal(file_of(values), file_of(values, int(why.split()[1])))


def test_previews_are_of_the_average(settings: Settings, tmp_path: Path) -> None:
    shown = {"sample_every": 6, "sample_prompts": ["a red cat"], "sample_steps": 2, "learning_rate": 0.5}
    pictures = {}
    for name, changes in (("a", {}), ("b", {"ema_decay": 0.9})):
        values = settings(output_dir=str(tmp_path / name / "run"), **shown, **EXACT, **changes)
        train(values)
        samples = sorted((Path(values["output_dir"]) / "samples").glob("*.png"))
        pictures[name] = [path.read_bytes() for path in samples]
    assert pictures["a"][0] == pictures["b"][0]  # before the first step
    assert pictures["a"][-1] != pictures["b"][-1]


def test_step_that_is_left_out_leaves_the_average_as_it_was(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(save_steps=1, max_steps=4, ema_decay=0.9, **EXACT)
    spoil(monkeypatch, {2}, math.nan)
    train(values)
    assert equal(file_of(values, 2), file_of(values, 3))
    assert not equal(file_of(values, 3), file_of(values, 4))


def test_going_back_takes_the_average_back(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, list[torch.Tensor]]] = []
    honest = loop.update_average

    def update(optimizer: torch.optim.Optimizer, step: int, decay: float) -> None:
        taken.append((step, [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]))
        honest(optimizer, step, decay)

    monkeypatch.setattr(loop, "update_average", update)
    values = settings(max_steps=8, save_steps=4, ema_decay=0.9, **EXACT)
    spoil(monkeypatch, {5, 6, 7}, math.nan)  # steps 6, 7 and 8 the first time; step 5 was taken and is undone with them
    seen = train(values)
    assert any("Back to the state after step 4" in note for note in seen.notes)
    assert [step for step, _ in taken] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    expected = taken[0][1]
    for step, weights in [*taken[1:4], *taken[5:]]:
        kept = min(step / (9 + step), 0.9)
        expected = [kept * old + (1 - kept) * new for old, new in zip(expected, weights, strict=True)]
    matrices = [value for key, value in file_of(values).items() if not key.endswith(".alpha")]
    for ours, by_hand in zip(by_shape(matrices), by_shape(expected), strict=True):
        torch.testing.assert_close(ours, by_hand)


def test_average_of_a_language_model(language_settings: Settings, tmp_path: Path) -> None:
    plain, averaged = (
        language_settings(output_dir=str(tmp_path / name / "run"), save_precision="fp32", keep="last", **changes)
        for name, changes in (("a", {}), ("b", {"ema_decay": 0.9}))
    )
    for values in (plain, averaged):
        train(values)
    assert equal(raw(plain, 6), raw(averaged, 6))
    files = [load_file(Path(v["output_dir"]) / "run" / "adapter_model.safetensors") for v in (plain, averaged)]
    assert not equal(*files)


def test_state_of_the_checkpoint_says_nothing_of_it_where_it_is_off(settings: Settings) -> None:
    values = settings(max_steps=2, **EXACT)
    train(values)
    folder = Path(values["output_dir"]) / "checkpoint-2"
    assert not [key for key in load_file(folder / "optimizer.safetensors") if "average" in key]
    assert json.loads((folder / "state.json").read_text("utf-8"))["identity"]["ema_decay"] == 0
