"""What many tests share: a tiny Stable Diffusion with random weights, a folder of drawn pictures, runs on both."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import fault_page

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are tiny: threads that wait for each other cost more than they save


def pytest_addoption(parser: pytest.Parser) -> None:
    fault_page.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    fault_page.configure(config)


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a few thousand random weights (32 px); read only."""
    from unit.sampling.tiny_sd import save_folder, tiny_parts

    return save_folder(tiny_parts(), tmp_path_factory.mktemp("models") / "tiny-sd")


def draw_pictures(folder: Path, count: int, size: int = 64) -> Path:
    """Pictures of the small world with captions, every third one wide."""
    import numpy as np

    from lora_scripts.builtin.world import canonical_caption, draw, random_scene

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "prompt"])
        for number in range(count):
            scene = random_scene(rng)
            image = draw(scene, number, size=size)
            if number % 3 == 0:
                image = image.crop((0, size // 8, size, size - size // 8))
            image.save(folder / f"{number:02d}.png")
            rows.writerow([f"{number:02d}.png", canonical_caption(scene)])
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of eight pictures with captions, the test's own."""
    return draw_pictures(tmp_path / "pictures", 8)


@pytest.fixture
def settings(tiny_sd_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes the settings of a short run on the tiny model; keywords override."""

    def make(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "train_data_dir": str(pictures),
            "base_model": str(tiny_sd_folder),
            "output_dir": str(tmp_path / "run"),
            "lora_rank": 2,
            "lora_alpha": 3,
            "batch_size": 2,
            "max_steps": 6,
            "save_steps": 2,
            "log_steps": 1,
            "learning_rate": 1e-2,
            "sample_every": 0,
            "device": "cpu",
        }
        return values | changes

    return make


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few thousand random weights with a tokenizer and a chat template; read only."""
    from helpers.tiny_causal_lms import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    """A folder with `train.jsonl` of sixteen questions and answers, the test's own."""
    import json

    folder = tmp_path / "dialogues"
    folder.mkdir()
    rows = [{"input": f"{n} and {n}?", "output": f"{2 * n}{', of course' * (n % 3)}"} for n in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture
def language_settings(tiny_language_model: Path, dialogues: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes the settings of a short run on dialogues; keywords override."""

    def make(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "task_type": "text-generation",
            "train_data_dir": str(dialogues),
            "base_model": str(tiny_language_model),
            "output_dir": str(tmp_path / "run"),
            "lora_rank": 2,
            "lora_alpha": 3,
            "batch_size": 4,
            "max_steps": 6,
            "save_steps": 2,
            "log_steps": 1,
            "learning_rate": 1e-2,
            "sample_every": 0,
            "device": "cpu",
        }
        return values | changes

    return make
