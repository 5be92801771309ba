"""`lora-scripts sample` on a tiny model, from options to pictures on the disk."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_scripts.errors import ConfigError, ModelError
from lora_scripts.export.writer import write_lora
from lora_scripts.families.protocol import SampleRequest
from lora_scripts.sampling.command import add_arguments, run
from lora_scripts.sampling.denoise import render
from lora_scripts.sampling.infotext import read_infotext
from unit.sampling.tiny_sd import merge, random_lora, save_folder, tiny_parts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a run with two checkpoints and a finished LoRA."""
    folder = tmp_path_factory.mktemp("place")
    parts = tiny_parts()
    save_folder(parts, folder / "base")
    for step in (2, 4):
        checkpoint = folder / "output" / "ink" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in (f"ink-{step}", "adapter"):
            write_lora(checkpoint / f"{name}.safetensors", random_lora(parts, seed=step), {}, torch.float16)
    write_lora(folder / "output" / "ink" / "ink.safetensors", random_lora(parts, seed=4), {}, torch.float16)
    return folder


@pytest.fixture
def sample(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command in the place; the pictures go to a folder of the test's own."""
    monkeypatch.chdir(place)

    def call(*options: str, output: Path = tmp_path / "pictures") -> list[Path]:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        common = ["--base-model", "base", "--steps", "3", "--device", "cpu", "--output", str(output)]
        assert run(parser.parse_args([*common, *options])) == 0
        return sorted(output.iterdir())

    return call


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_picture_with_a_lora_is_that_of_the_merged_weights_and_says_how_it_was_made(sample) -> None:
    prompt = "a (red:1.2) fox <lora:ink:0.5:0.9>"
    files = sample("--prompt", prompt, "--negative", "blurry", "--seed", "5", "--size", "32x40", "--cfg", "4")
    assert [path.name for path in files] == ["00000-5.png"]

    merged = tiny_parts()
    weights = random_lora(merged, seed=4)
    merge(merged, {name: lora for name, lora in weights.items() if name.startswith("text_encoder.")}, 0.5)
    merge(merged, {name: lora for name, lora in weights.items() if name.startswith("unet.")}, 0.9)
    request = SampleRequest("a (red:1.2) fox", "blurry", 5, 3, 4.0, 32, 40)
    expected = np.asarray(render(merged, [request], "cpu")[0]).astype(int)
    base = np.asarray(render(tiny_parts(), [request], "cpu")[0]).astype(int)
    assert np.abs(pixels(files[0]) - expected).max() <= 2  # the file is in half precision
    assert np.abs(pixels(files[0]) - base).max() > 10

    found = read_infotext(files[0])
    assert found is not None
    assert (found.prompt, found.negative_prompt) == (prompt, "blurry")
    shown = {key: found.settings[key] for key in ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model")}
    assert shown == {
        "Steps": "3", "Sampler": "DPM++ 2M", "CFG scale": "4.0", "Seed": "5", "Size": "32x40", "Model": "base"
    }  # fmt: skip
    assert found.settings["Lora hashes"].startswith("ink: ")


def test_prompts_from_a_file_and_counted_seeds_never_overwrite_a_picture(sample, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeff# comment\n\n水墨 fox <lora:ink-2:1>\na house\n", encoding="utf-8")
    first = sample("--prompts", str(tmp_path / "prompts.txt"), "--count", "2", "--size", "32")
    assert [path.name for path in first] == ["00000-42.png", "00001-43.png", "00002-42.png", "00003-43.png"]
    infos = [read_infotext(path) for path in first]
    assert [info.prompt for info in infos if info] == ["水墨 fox <lora:ink-2:1>"] * 2 + ["a house"] * 2
    before = [path.read_bytes() for path in first]
    again = sample("--prompt", "a house", "--size", "32")
    assert [path.read_bytes() for path in again[:4]] == before
    assert again[4].name == "00004-42.png"
    assert np.array_equal(pixels(again[4]), pixels(again[2]))


def test_grid_compares_checkpoints_and_weights_and_renders_weight_zero_once(sample, capsys) -> None:
    files = sample("--prompt", "a fox", "--prompt", "a house", "--checkpoints", "output/ink", "--weights", "0,1")
    pictures = [path for path in files if not path.name.startswith("grid")]
    assert len(pictures) == 2 * (1 + 3)
    assert [path.name for path in files if path.name.startswith("grid")] == ["grid-0000.png"]
    by_prompt = {info.prompt: path for path in pictures if (info := read_infotext(path))}
    assert set(by_prompt) == {
        f"{prompt}{tag}"
        for prompt in ("a fox", "a house")
        for tag in ("", " <lora:ink-2:1>", " <lora:ink-4:1>", " <lora:ink:1>")
    }
    different = np.abs(pixels(by_prompt["a fox <lora:ink-2:1>"]) - pixels(by_prompt["a fox <lora:ink-4:1>"]))
    assert different.max() > 5
    # The last checkpoint and the finished file hold the same weights.
    assert np.array_equal(pixels(by_prompt["a fox <lora:ink-4:1>"]), pixels(by_prompt["a fox <lora:ink:1>"]))
    with Image.open(files[-1]) as grid:
        assert grid.width > 6 * 192
        assert "ink-2 0 | ink-2 1 | ink-4 0 | ink-4 1 | ink 0 | ink 1" in grid.info["parameters"]
    assert "8 pictures of 32x32" in capsys.readouterr().out


def test_model_is_without_lora_again_for_the_next_prompt(sample) -> None:
    files = sample("--prompt", "a fox <lora:ink:1>", "--prompt", "a fox", "--size", "32")
    alone = np.asarray(render(tiny_parts(), [SampleRequest("a fox", "", 42, 3, 7.0, 32, 32)], "cpu")[0]).astype(int)
    assert np.abs(pixels(files[1]) - alone).max() <= 1
    assert np.abs(pixels(files[0]) - alone).max() > 5


def test_unknown_lora_is_refused_with_the_nearest_name_before_anything_is_rendered(sample, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"<lora:ikn>: no such LoRA in output/ink\. Did you mean ink"):
        sample("--prompt", "a fox", "--prompt", "a fox <lora:ikn:1>")
    assert list((tmp_path / "pictures").iterdir()) == []


def test_folder_of_loras_can_be_named(sample, place: Path) -> None:
    folder = str(place / "output" / "ink" / "checkpoint-2")
    assert len(sample("--prompt", "a <lora:ink-2:1>", "--lora-dir", folder, "--size", "32")) == 1
    with pytest.raises(ConfigError, match=r"<lora:ink>: no such LoRA in .*checkpoint-2"):
        sample("--prompt", "a <lora:ink:1>", "--lora-dir", folder)
    with pytest.raises(ConfigError, match="--lora-dir nowhere: no such folder"):
        sample("--prompt", "a", "--lora-dir", "nowhere")


def test_lora_for_another_base_model_is_refused_with_the_reason(sample, tmp_path: Path) -> None:
    write_lora(tmp_path / "wide.safetensors", random_lora(tiny_parts(context=32)), {}, torch.float16)
    with pytest.raises(ModelError, match=r"wide.* made for another base model"):
        sample("--prompt", "a <lora:wide:1>", "--lora-dir", str(tmp_path))


def test_sizes_are_checked_against_the_model(sample) -> None:
    with pytest.raises(ConfigError, match=r"--size 33x40: both sides must be multiples of 8\. The nearest is 32x40"):
        sample("--prompt", "a", "--size", "33x40")
