"""What the trainers train: base models with random weights, pictures with captions, and the random numbers of every step."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

SEED = 42
TOKENIZERS = {"openai_clip-vit-large-patch14": "<|endoftext|>", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": "!"}
"""Folder in sd-scripts' `--tokenizer_cache_dir` to what captions are filled up with."""


@dataclass(frozen=True)
class Base:
    """A base model in the layouts that trainers read.

    Attributes:
        file: single file of the original layout.
        folder: diffusers folder.
        tokenizer_cache: a folder in which sd-scripts looks for the tokenizer.
    """

    file: Path
    folder: Path
    tokenizer_cache: Path


@dataclass(frozen=True)
class Pictures:
    """The same pictures as every trainer wants them: `plain` with .txt files, `table` with metadata.csv, `kohya` with 1_name.

    In `table` and `kohya` their names follow the order in which our steps use them, each once.
    """

    plain: Path
    table: Path
    kohya: Path
    draws: Path


def make_base(place: Path, family: str) -> Base:
    """Random weights of the family's full size, made once per place.

    Args:
        family: "sd15" or "sdxl"; "tiny-sdxl" for a few layers of it; "mini-sd" as it is built in.
    """
    import torch

    from lora_scripts.builtin.weights import builtin_path
    from lora_scripts.models.single_file import builtin_single_file
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.models.stable_diffusion import load_stable_diffusion

    base = Base(place / f"{family}.safetensors", place / family, place / "tokenizers")
    if (base.folder / "model_index.json").is_file():
        return base
    place.mkdir(parents=True, exist_ok=True)
    if family == "mini-sd":
        folder = builtin_path(family)
        shutil.copyfile(builtin_single_file(folder), base.file)
        shutil.copytree(folder, base.folder)
        return base
    if family.startswith("tiny-"):
        from helpers.tiny_diffusion import save_folder, save_single_file, tiny_parts

        parts = tiny_parts(family.removeprefix("tiny-"))
        save_single_file(parts, base.file)
        save_folder(parts, base.folder)
        return base
    from helpers.full_size import write_full_size
    from helpers.library_networks import library_parts

    write_full_size(base.file, family)
    source = resolve_base_model(str(base.file))
    parts = library_parts(load_stable_diffusion(source, "cpu", torch.float16))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if (part := getattr(parts, name)) is not None:
            part.save_pretrained(base.folder / name)
    for name, pad_token in TOKENIZERS.items():
        write_old_tokenizer(base.tokenizer_cache / name, pad_token)
    pipeline_index(base.folder, parts)
    return base


def write_old_tokenizer(folder: Path, pad_token: str) -> None:
    """CLIP's tokenizer in the files that transformers 4 reads."""
    from lora_scripts.models.clip_tokenizer import clip_merges, clip_vocabulary

    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": pad_token,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, clip_merges())]) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", "utf-8")


def pipeline_index(folder: Path, parts: object) -> None:
    """The scheduler's configuration, and then model_index.json: a folder that holds it is whole."""
    from diffusers import DDPMScheduler

    DDPMScheduler.from_config(parts.scheduler_config).save_pretrained(folder / "scheduler")  # type: ignore[attr-defined]
    two = getattr(parts, "text_encoder_2", None) is not None
    index = {
        "_class_name": "StableDiffusionXLPipeline" if two else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if two:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def make_pictures(place: Path, *, side: int, batch_size: int, steps: int) -> Pictures:
    """As many pictures as the steps use, with captions, and what our side draws for them in every step."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from lora_scripts.builtin.world import canonical_caption, draw, random_scene
    from lora_scripts.data.sampler import StepPlan
    from lora_scripts.objectives.ddpm import sample_timesteps
    from lora_scripts.training.draws import Draws

    latent_side = side // 8
    shutil.rmtree(place, ignore_errors=True)
    pictures = Pictures(place / "plain", place / "table", place / "kohya", place / "draws.safetensors")
    kohya = pictures.kohya / "1_pictures"
    for folder in (pictures.plain, pictures.table, kohya):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    captions = {}
    for number in range(batch_size * steps):
        scene = random_scene(rng)
        name = f"{number:03}.png"
        draw(scene, number, size=side).save(pictures.plain / name)
        captions[name] = canonical_caption(scene)
        (pictures.plain / name).with_suffix(".txt").write_text(captions[name], "utf-8")
    names = list(captions)
    plan = StepPlan(names, [(side, side)] * len(names), [1] * len(names), batch_size, SEED)
    uses = [use for number in range(steps) for use in plan.step(number)]
    rows = []
    for number, use in enumerate(uses):
        name, caption = f"{number:03}.png", captions[names[use.index]]
        for folder in (pictures.table, kohya):
            shutil.copyfile(pictures.plain / names[use.index], folder / name)
        (kohya / name).with_suffix(".txt").write_text(caption, "utf-8")
        rows.append((name, caption))
    with (pictures.table / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    draws, shape, keys = Draws(SEED), (4, latent_side, latent_side), [use.key for use in uses]
    tensors = {name: draws.normal(keys, shape, name) for name in ("noise", "posterior")}
    tensors["timesteps"] = sample_timesteps(draws, keys, 1000)
    in_steps = {name: values.unflatten(0, (steps, batch_size)).contiguous() for name, values in tensors.items()}
    assert in_steps["timesteps"].dtype is torch.int64
    save_file(in_steps, pictures.draws)
    return pictures


__all__ = ["SEED", "Base", "Pictures", "make_base", "make_pictures"]
