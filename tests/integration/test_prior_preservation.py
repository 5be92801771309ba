"""Prior preservation: what it holds, what it costs, what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.reference_training import encoded, load_family
from helpers.seen import train
from helpers.tiny_diffusion import save_folder, tiny_parts
from lora_scripts.adapters.lora import Adapter, attach
from lora_scripts.families.protocol import Batch
from lora_scripts.training.draws import Draws

Settings = Callable[..., dict[str, Any]]
PRIOR = {"prior_preservation_weight": 1.0, "prior_prompt": "a dog"}
KINDS = ["lora", "locon", "dora", "loha", "lokr", "oft"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_folder(tiny_parts(family), root / family) for family in ("sd15", "sdxl")}


def made(folder: Path, kind: str = "lora", init: str = "gaussian", **changes: Any) -> tuple[Any, Adapter, Batch]:
    """A family with an adapter that does something, and a batch for it."""
    family = load_family(folder, **changes)
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    batch = encoded(family, pixels)
    adapter = attach(family.components, {"unet": family.default_targets["unet"]}, rank=2, alpha=3, kind=kind, init=init)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return family, adapter, batch


def with_caption(family: Any, batch: Batch, caption: str) -> Batch:
    text = family.text_encoders()[0].run([caption])[0]
    rows = {name: tensor.expand(len(batch), *tensor.shape) for name, tensor in text.items()}
    return Batch({**batch.tensors, **rows}, [caption] * len(batch), batch.keys)


@torch.no_grad()
def measured(family: Any, batch: Batch) -> float:
    return float(family.loss(batch.at_levels([0.5] * 4), Draws(1)).total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family_name", ["sd15", "sdxl"])
def test_term_is_the_same_prediction_with_the_adapter_taken_out(
    folders: dict[str, Path], family_name: str, kind: str
) -> None:
    family, adapter, batch = made(folders[family_name], kind, min_snr_gamma=0, **PRIOR)
    draws = Draws(5)
    of_class = with_caption(family, batch, "a dog")
    with torch.no_grad():
        total, plain = family.loss(batch, draws).total, family.loss(batch.at_levels([0.5] * 4), draws)
        family._config = family._config.model_copy(update={"prior_preservation_weight": 0.0})
        main = family.loss(batch, draws).total
        measured = family.loss(batch.at_levels([0.5] * 4), draws)
        moved = family.predict(of_class, draws)
        adapter.detach()
        frozen = family.predict(of_class, draws)
    drift = (moved - frozen).square().mean(dim=(1, 2, 3)).sum()
    assert float(drift) > 1e-6
    torch.testing.assert_close(total - main, drift, rtol=1e-3, atol=1e-6)
    assert torch.equal(plain.total, measured.total)  # a measurement is made without it


def test_no_gradient_goes_through_the_frozen_prediction(folders: dict[str, Path]) -> None:
    family, adapter, batch = made(folders["sd15"], **PRIOR)
    draws = Draws(5)
    parameters = adapter.parameters()
    found = torch.autograd.grad(family.loss(batch, draws).total, parameters)
    # The same with the base model's answer as a constant.
    noised = family._objective.noised(batch, draws)
    of_class = family._class_prompt.in_place_of_captions(batch)

    def answer(batch: Batch) -> torch.Tensor:
        return family._denoise(noised.noisy_latents, noised.timesteps, batch)

    with torch.no_grad(), adapter.disabled():
        constant = answer(of_class).clone()
    total = family._objective.loss(answer(batch), noised, batch).total
    total = total + family._objective.drift(answer(of_class), constant, noised)
    for ours, expected in zip(found, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(ours, expected)


def test_checkpointing_gives_the_same_gradient(folders: dict[str, Path]) -> None:
    gradients = []
    for on in (False, True):
        family, adapter, batch = made(folders["sdxl"], **PRIOR)
        family.set_checkpointing(on)
        gradients.append(torch.autograd.grad(family.loss(batch, Draws(5)).total, adapter.parameters()))
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-4, atol=1e-7)


def test_class_prompt_is_encoded_once_in_a_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_scripts.families.sd15 import StableDiffusion15

    read: list[str] = []
    honest = StableDiffusion15._encode_captions

    def encode(self: StableDiffusion15, captions: Any) -> Any:
        read.extend(captions)
        return honest(self, captions)

    monkeypatch.setattr(StableDiffusion15, "_encode_captions", encode)
    train(settings(max_steps=3, save_steps=3, **PRIOR))
    assert read.count("a dog") == 1


def test_planning_memory_leaves_nothing_empty_behind(settings: Settings) -> None:
    """The planner runs the loss with tensors that hold nothing; the run must have the class prompt's real encoding."""
    planned = train(settings(max_steps=2, save_steps=2, batch_size="auto", **PRIOR))
    plain = train(settings(max_steps=2, save_steps=2, batch_size=4, output_dir=settings()["output_dir"] + "2", **PRIOR))
    (told,) = [note for note in planned.notes if note.startswith("Memory: ")]
    assert "predicted" in told
    assert "cannot be predicted" not in told
    assert [report.losses for report in planned.reports] == [report.losses for report in plain.reports]


@pytest.mark.parametrize("speed", [{"cuda_graphs": True}, {"block_swap": 1}], ids=lambda speed: ",".join(speed))
def test_settings_of_speed_change_nothing_in_it(settings: Settings, tmp_path: Path, speed: dict[str, Any]) -> None:
    """Three passes share the buffers of a recording, or the memory that blocks visit."""
    # Weights that are joined, which those of swapped blocks are not, give other roundings.
    common = {"buckets": False, "fuse_layers": False, **PRIOR}
    plain, other = (
        train(settings(output_dir=str(tmp_path / name), **common, **changes))
        for name, changes in (("plain", {}), ("other", speed))
    )
    assert [report.losses for report in other.reports] == [report.losses for report in plain.reports]


def test_class_stays_nearer_to_the_base_model_and_the_subject_is_learnt(folders: dict[str, Path]) -> None:
    drift, learnt = {}, {}
    for weight in (0.0, 1.0):
        prior = PRIOR if weight else {}
        family, adapter, batch = made(folders["sd15"], min_snr_gamma=0, **prior)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name.endswith("lora_B"):
                    parameter.zero_()
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-2)
        first = measured(family, batch)
        for step in range(40):
            keys = [f"{step}/{key}" for key in batch.keys]
            family.loss(Batch(batch.tensors, batch.captions, keys), Draws(1)).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        of_class = with_caption(family, batch, "a dog")
        with torch.no_grad():
            moved = family.predict(of_class, Draws(9))
            with adapter.disabled():
                drift[weight] = float((moved - family.predict(of_class, Draws(9))).square().mean())
            learnt[weight] = first - measured(family, batch)
    assert drift[1.0] < 0.5 * drift[0.0]
    assert learnt[1.0] > 0
