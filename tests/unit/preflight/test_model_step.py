"""One measured step on the tiny model: what it finds, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_scripts.attaching import attach_adapter
from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache
from lora_scripts.data.dataset import Dataset, open_dataset
from lora_scripts.families import family_class
from lora_scripts.families.sd15 import StableDiffusion15
from lora_scripts.models.source import resolve_base_model
from lora_scripts.preflight.findings import Report
from lora_scripts.preflight.model_step import LoadedModel, measure_step
from lora_scripts.preflight.run import preflight
from lora_scripts.training.events import Events

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SIZE = (64, 64)


class Run:
    """A config with its data set and loaded model."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.config = RunConfig.model_validate(values)
        source = resolve_base_model(self.config.base_model)
        family = family_class(source.family).load(source, self.config, torch.device("cpu"), torch.float32)
        self.model = LoadedModel(family, torch.device("cpu"))
        self.dataset: Dataset = open_dataset(self.config, SIZE)
        self.cache = EncodingCache(self.config.train_data_dir / ".cache")

    def check(self, measure: bool = True) -> Report:
        return preflight(self.config, self.dataset, SIZE, self.cache, self.model, measure=measure)


@pytest.fixture
def run(settings: Callable[..., dict[str, Any]]) -> Callable[..., Run]:
    def make(**changes: Any) -> Run:
        return Run(settings(resolution=64, **changes))

    return make


def limit(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    plain = StableDiffusion15.loss

    def loss(self: Any, batch: Any, draws: Any) -> Any:
        if len(batch) > most:
            raise OUT_OF_MEMORY
        return plain(self, batch, draws)

    monkeypatch.setattr(StableDiffusion15, "loss", loss)


def codes(report: Report) -> dict[str, str]:
    return {finding.code: finding.level for finding in report.findings}


def test_run_that_fits_is_predicted(run: Callable[..., Run]) -> None:
    report = run(max_steps=40).check()
    assert not report.blocked
    assert report.prediction is not None
    assert report.prediction.steps == 40
    assert report.prediction.total_seconds is not None
    assert report.prediction.total_seconds >= 40 * (report.prediction.step_seconds or 0) > 0
    assert report.prediction.peak_bytes is not None
    assert report.prediction.peak_bytes > 10_000_000


def test_without_a_step_the_disk_is_predicted_and_nothing_is_computed(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 0)
    report = run().check(measure=False)
    assert not report.blocked
    assert report.prediction is not None
    assert report.prediction.disk_bytes > 0
    assert report.prediction.total_seconds is None


def test_step_leaves_weights_gradients_and_random_state_as_they_were(run: Callable[..., Run]) -> None:
    this = run(lora_dropout=0.5, train_text_encoder=True)
    adapter = attach_adapter(this.model.family, this.config, Events())
    before = {name: value.detach().clone() for name, value in adapter.named_parameters()}
    random_state = torch.get_rng_state()
    step = measure_step(this.model, adapter, this.config, this.dataset, this.cache)
    assert step.fitted == step.wanted == 2
    assert step.seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in adapter.named_parameters())
    assert all(value.grad is None for value in adapter.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_model_is_as_before_the_check(run: Callable[..., Run]) -> None:
    this = run()
    before = {name: type(module) for name, module in this.model.family.components["unet"].named_modules()}
    this.check()
    assert {name: type(module) for name, module in this.model.family.components["unet"].named_modules()} == before


def test_only_the_pictures_of_one_pass_are_encoded(run: Callable[..., Run]) -> None:
    this = run(batch_size=2)
    this.check()
    assert this.cache.folder is not None
    assert len(list((this.cache.folder / "latents").rglob("*.safetensors"))) == 2


def test_batch_that_does_not_fit_is_amber_with_the_size_that_does(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 2)
    report = run(batch_size=4, buckets=False).check()
    assert codes(report)["batch-too-large"] == "amber"
    assert any("batch_size: 2" in finding.remedy for finding in report.findings)


def test_single_picture_that_does_not_fit_blocks(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 0)
    report = run().check()
    assert codes(report)["out-of-memory"] == "red"
    assert report.exit_code() == 2


def test_encoder_that_runs_out_of_memory_blocks(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, pixels: Any) -> Any:
        raise OUT_OF_MEMORY

    monkeypatch.setattr(StableDiffusion15, "_encode_pixels", fail)
    assert codes(run().check())["out-of-memory"] == "red"


def test_loss_that_is_no_number_blocks(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StableDiffusion15.loss

    def loss(self: Any, batch: Any, draws: Any) -> Any:
        answer = plain(self, batch, draws)
        return replace(answer, total=answer.total * float("nan"))

    monkeypatch.setattr(StableDiffusion15, "loss", loss)
    assert codes(run().check())["loss-not-finite"] == "red"


def test_other_failures_are_not_taken_for_a_lack_of_memory(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: Any, batch: Any, draws: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(StableDiffusion15, "loss", loss)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run().check()


def test_full_disk_blocks(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_scripts.preflight.disk.free_bytes", lambda folder: 1000)
    assert codes(run().check(measure=False))["disk-full"] == "red"
