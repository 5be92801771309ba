"""What a run does before its first step, and what it leaves for later or does not do at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.seen import train
from lora_scripts.config import RunConfig
from lora_scripts.errors import ModelError
from lora_scripts.families.sd15 import StableDiffusion15
from lora_scripts.models import filling, reading_ahead
from lora_scripts.models.source import resolve_base_model

ROOT = Path(__file__).parents[2]
NOT_NEEDED = (
    "diffusers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "torchao",
    "torch._inductor.compile_fx",
    "transformers.modeling_utils",
    "lora_scripts.report.build",
    "lora_scripts.sampling.denoise",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "torchvision",
    "datasets",
)


Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def parts_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the tiny model from which weights are read, in order."""
    read: list[str] = []
    for module in (filling, reading_ahead):
        real = module.read_tensors

        def watched(header: Any, names: Any, real: Any = real, **options: Any) -> Any:
            for name, tensor in real(header, names, **options):
                if header.path.parent.name not in read:
                    read.append(header.path.parent.name)
                yield name, tensor

        monkeypatch.setattr(module, "read_tensors", watched)
    return read


def test_encoders_are_read_only_where_something_is_to_be_encoded(settings: Settings, parts_read: list[str]) -> None:
    first = train(settings(max_steps=2))
    assert parts_read == ["unet", "vae", "text_encoder"]
    shutil.rmtree(settings()["output_dir"])
    parts_read.clear()
    again = train(settings(max_steps=2))
    assert parts_read == ["unet"]
    assert [report.losses for report in again.reports] == [report.losses for report in first.reports]


def test_a_trained_text_encoder_is_read_at_once(settings: Settings, parts_read: list[str]) -> None:
    train(settings(max_steps=2, train_text_encoder=True))
    shutil.rmtree(settings()["output_dir"])
    parts_read.clear()
    train(settings(max_steps=2, train_text_encoder=True))
    assert parts_read == ["unet", "text_encoder"]


def test_previews_read_what_they_need_though_everything_is_cached(settings: Settings, parts_read: list[str]) -> None:
    train(settings(max_steps=2))
    shutil.rmtree(settings()["output_dir"])
    parts_read.clear()
    values = settings(max_steps=2, sample_every=2, sample_prompts=["a red cat"], sample_steps=2)
    train(values)
    assert set(parts_read) == {"unet", "vae", "text_encoder"}
    assert (Path(values["output_dir"]) / "run.png").is_file()


def broken_text_encoder(tiny_sd_folder: Path, place: Path) -> Path:
    shutil.copytree(tiny_sd_folder, place)
    [file] = (place / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("q_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    return place


def test_a_broken_text_encoder_is_refused_before_anything_is_encoded_with_it(
    settings: Settings, tiny_sd_folder: Path, tmp_path: Path
) -> None:
    base = broken_text_encoder(tiny_sd_folder, tmp_path / "broken")
    with pytest.raises(ModelError, match=r"q_proj.*NaN or infinite"):
        train(settings(base_model=str(base)))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_text_encoder_of_other_shapes_is_refused_though_it_is_not_read(
    settings: Settings, tiny_sd_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "misfit"
    shutil.copytree(tiny_sd_folder, base)
    [file] = (base / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file, {"format": "pt"})
    config = RunConfig.model_validate(settings(base_model=str(base)))
    with pytest.raises(ModelError, match=r"text_encoder's .*q_proj.*expected"):
        StableDiffusion15.load(resolve_base_model(config.base_model), config, torch.device("cpu"), torch.float32)


def test_weights_read_ahead_are_the_files(settings: Settings, tiny_sd_folder: Path) -> None:
    config = RunConfig.model_validate(settings())
    before = torch.get_num_threads(), sys.getswitchinterval()
    family = StableDiffusion15.load(resolve_base_model(config.base_model), config, torch.device("cpu"), torch.bfloat16)
    [file] = (tiny_sd_folder / "unet").glob("*.safetensors")
    stored, unet = load_file(file), family.components["unet"].state_dict()
    assert unet.keys() == stored.keys()
    assert all(torch.equal(unet[name], stored[name].to(torch.bfloat16)) for name in stored)
    images = [weight for weight in unet.values() if weight.ndim == 4]
    assert images
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in images)
    assert (torch.get_num_threads(), sys.getswitchinterval()) == before


def test_no_library_that_a_first_step_does_without_is_imported_before_it(settings: Settings, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(settings(max_steps=1)), "utf-8")
    code = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "from torch.optim.optimizer import register_optimizer_step_post_hook\n"
        f"found = lambda *_: print('IMPORTED', json.dumps([name for name in {NOT_NEEDED!r} if name in sys.modules]))\n"
        "register_optimizer_step_post_hook(found)\n"
        "from lora_scripts.cli import main\n"
        f"sys.exit(main(['train', '--config', {str(config)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("IMPORTED")]
    assert json.loads(line.removeprefix("IMPORTED")) == []
