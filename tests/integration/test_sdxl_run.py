"""Whole runs on tiny random single files of SDXL and Stable Diffusion 2: training, the finished file in diffusers, previews."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import commands
from helpers.library_networks import library_parts
from helpers.tiny_diffusion import save_single_file, tiny_parts
from lora_scripts.models.stable_diffusion import StableDiffusionParts

Settings = Callable[..., dict[str, Any]]
RANK, ALPHA, STEPS = 2, 3, 3
VERSIONS = {
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", "card": "SDXL", "prediction": "epsilon"},
    "sd2": {"ss_base_model_version": "sd_v2_v", "ss_v2": "True", "card": "SD2", "prediction": "v"},
}
PREDICTIONS = {"sdxl": "epsilon", "sd2": "v_prediction"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        family: save_single_file(tiny_parts(family, prediction_type=kind), folder / f"tiny-{family}.safetensors")
        for family, kind in PREDICTIONS.items()
    }


@contextmanager
def no_log_warnings() -> Iterator[None]:
    """Fails when diffusers, transformers or PEFT log a warning meanwhile; they print instead of warning."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def pipeline(parts: StableDiffusionParts) -> Any:
    """diffusers' own pipeline around the parts."""
    parts = library_parts(parts)
    shared = {"vae": parts.vae, "unet": parts.unet, "scheduler": DDIMScheduler(**_known(parts.scheduler_config))}
    texts = {"text_encoder": parts.text_encoder, "tokenizer": parts.tokenizer}
    if parts.text_encoder_2 is None:
        return StableDiffusionPipeline(
            **shared, **texts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    seconds = {"text_encoder_2": parts.text_encoder_2, "tokenizer_2": parts.tokenizer_2}
    return StableDiffusionXLPipeline(**shared, **texts, **seconds)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    names = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")
    return {name: config[name] for name in names if name in config}


def roots(parts: StableDiffusionParts) -> dict[str, torch.nn.Module]:
    named = {name: getattr(parts, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    return {name: module for name, module in named.items() if module is not None}


def changes_in_diffusers(parts: StableDiffusionParts) -> dict[str, torch.Tensor]:
    """Layer -> weight change, as diffusers and PEFT have understood the file."""
    return {
        f"{component}.{name.removeprefix('text_model.')}": module.get_delta_weight(adapter).detach()
        for component, root in roots(parts).items()
        for name, module in root.named_modules()
        if hasattr(module, "lora_A")
        for adapter in module.lora_A
    }


def effects(parts: StableDiffusionParts) -> tuple[torch.Tensor, ...]:
    """Text embeddings, and the U-Net's output for them."""
    made = pipeline(parts)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if parts.text_encoder_2 is None:
            embeds, _ = made.encode_prompt("a red fox", "cpu", 1, False)
            return embeds, parts.unet(latents, 500, embeds, return_dict=False)[0]
        embeds, _, pooled, _ = made.encode_prompt("a red fox", device="cpu", do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        output = parts.unet(latents, 500, embeds, added_cond_kwargs=added, return_dict=False)[0]
        return embeds, pooled, output


@pytest.mark.parametrize("family", VERSIONS)
def test_run_on_a_single_file_ends_in_a_file_that_diffusers_reads_whole(
    family: str,
    models: dict[str, Path],
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = settings(
        base_model=str(models[family]),
        train_text_encoder=True,
        text_encoder_learning_rate=2e-2,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        resolution=64,
        flip=True,
        caption_dropout=0.2,
        max_steps=STEPS,
        save_steps=STEPS,
        save_precision="fp32",
        sample_every=STEPS,
        sample_prompts=["a (red:1.3) fox"],
        sample_steps=2,
        trigger_word="sks",
        clip_model="none",
    )
    code, out, err = commands.train(values, tmp_path, capsys)
    assert code == 0, out + err
    file = tmp_path / "run" / "run.safetensors"
    trained = load_file(tmp_path / "run" / f"checkpoint-{STEPS}" / "adapter.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in trained}
    assert {layer.split(".")[0] for layer in layers} == set(roots(tiny_parts(family)))

    by_hand, loaded, plain = (tiny_parts(family, prediction_type=PREDICTIONS[family]) for _ in range(3))
    with no_log_warnings():
        pipeline(loaded).load_lora_weights(str(file))
    changes = changes_in_diffusers(loaded)
    assert set(changes) == layers
    for layer, change in changes.items():
        ours = ALPHA / RANK * trained[f"{layer}.lora_B"] @ trained[f"{layer}.lora_A"]
        torch.testing.assert_close(change, ours, rtol=1e-4, atol=1e-6)
        component, _, path = layer.partition(".")
        with torch.no_grad():
            by_hand.components[component].get_submodule(path).weight += ours
    moved = [layer for layer, change in changes.items() if float(change.abs().max()) > 0]
    assert {layer.split(".")[0] for layer in moved} == set(roots(plain))
    for ours, theirs, base in zip(effects(by_hand), effects(loaded), effects(plain), strict=True):
        assert float((ours - base).norm()) > 1e-3
        assert float((theirs - ours).norm()) < 1e-3 * float((ours - base).norm())

    with safe_open(file, "pt") as stored:
        header = stored.metadata()
    expected = VERSIONS[family]
    assert {key: header[key] for key in expected if key.startswith("ss_")} == {
        key: value for key, value in expected.items() if key.startswith("ss_")
    }
    assert header["modelspec.prediction_type"] == expected["prediction"]
    assert json.loads(file.with_suffix(".json").read_text())["sd version"] == expected["card"]
    with Image.open(file.with_suffix(".png")) as preview:
        assert preview.size == (64, 64)


def test_sizes_and_crops_of_the_files_reach_the_batches(
    models: dict[str, Path], settings: Settings, pictures: Path
) -> None:
    from lora_scripts.config import RunConfig
    from lora_scripts.data.cache import EncodingCache
    from lora_scripts.data.captions import CaptionSettings
    from lora_scripts.data.dataset import open_dataset
    from lora_scripts.data.encoded import encode_all
    from lora_scripts.families.sdxl import StableDiffusionXL
    from lora_scripts.models.source import resolve_base_model

    Image.new("RGB", (150, 100), "red").save(pictures / "07.png")
    config = RunConfig.model_validate(
        settings(base_model=str(models["sdxl"]), resolution=64, buckets=False, flip=True, train_text_encoder=True)
    )
    source = resolve_base_model(config.base_model)
    family = StableDiffusionXL.load(source, config, torch.device("cpu"), torch.float32)
    dataset = open_dataset(config, (64, 64))
    data = encode_all(
        dataset, family.encoders(), CaptionSettings.of(config), EncodingCache(None), flip=True, num_workers=1
    )
    index = next(i for i, example in enumerate(data.examples) if example.name == "07.png")
    assert data.images[index, False]["add_time_ids"].tolist() == [100, 150, 0, 16, 64, 64]
    assert data.images[index, True]["add_time_ids"].tolist() == [100, 150, 0, 16, 64, 64]


def test_sdxl_autoencoder_in_half_precision_is_run_again_where_it_overflows(
    models: dict[str, Path],
    settings: Settings,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lora_scripts.families import latent_diffusion

    honest = latent_diffusion.load_stable_diffusion

    def load(*args: Any, **options: Any) -> Any:
        parts = honest(*args, **options)
        parts.read_rest()
        assert parts.vae.dtype is torch.float16
        parts.vae.encoder.conv_in.weight.data.fill_(4e4 / 27)  # passes 65504 on bright pixels; the norm brings it back
        parts.vae.encoder.conv_in.bias.data.fill_(4e4)
        return parts

    monkeypatch.setattr(latent_diffusion, "load_stable_diffusion", load)
    for number in range(8):
        Image.new("RGB", (64, 64), (250, 255, 240) if number == 3 else (number, 0, 9)).save(pictures / f"0{number}.png")
    values = settings(base_model=str(models["sdxl"]), resolution=64, max_steps=1, vae_precision="fp16")
    code, out, err = commands.train(values, tmp_path, capsys)
    assert code == 0, err
    assert [line for line in out.splitlines() if "encoded again in float32" in line and "03.png" in line]
    assert "8 of 8 pictures train." in out


def test_sample_command_renders_sdxl_at_its_own_size(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_scripts.cli import main

    words = ["sample", "--base-model", str(models["sdxl"]), "--prompt", "a (red:1.2) fox", "--steps", "2"]
    assert main([*words, "--count", "2", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0, (
        capsys.readouterr()
    )
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) == 2
    with Image.open(pictures[0]) as one, Image.open(pictures[1]) as two:
        assert one.size == (64, 64)
        assert one.tobytes() != two.tobytes()


def test_plan_of_sdxl_reads_no_weight(
    models: dict[str, Path], settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_scripts.cli import main

    config = tmp_path / "my.yaml"
    config.write_text(json.dumps(settings(base_model=str(models["sdxl"]), resolution=64, train_text_encoder=True)))
    assert main(["plan", str(config), "--memory-gb", "12"]) == 0
    out = capsys.readouterr().out
    assert "sdxl" in out
