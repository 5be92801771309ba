"""How each trainer is told to train the same: ours, diffusers' LoRA example, and sd-scripts' `train_network.py`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite import ROOT
from suite.materials import SEED, Base, Pictures
from suite.turns import Command

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        side: of the pictures, pixels.
        layers: that get an adapter, as our `target_modules`.
        cached_latents: of sd-scripts alone; ours always caches them, the example of diffusers never does.
    """

    family: str
    side: int
    batch_size: int
    steps: int
    layers: tuple[str, ...] = ATTENTION
    train_text_encoder: bool = False
    cached_latents: bool = False
    rank: int = 8
    rate: float = 1e-4
    precision: str = "bf16"
    device: str = "cpu"


@dataclass(frozen=True)
class Peer:
    """A script of another project, and the interpreter that has what it needs."""

    script: Path
    python: str = sys.executable


def words(arguments: Mapping[str, Any]) -> list[str]:
    """`--name value` for each; only the name where the value is true."""
    said: list[str] = []
    for name, value in arguments.items():
        said += [f"--{name}"] if value is True else [f"--{name}", str(value)] if value not in (None, False) else []
    return said


def ours(work: Work, base: Base, pictures: Pictures, place: Path) -> Command:
    import yaml

    shutil.rmtree(place / "run", ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "train_data_dir": str(pictures.plain),
        "cache_dir": str(place / "cache"),
        "resolution": work.side,
        "base_model": "builtin:mini-sd" if work.family == "mini-sd" else str(base.file),
        "device": work.device,
        "mixed_precision": work.precision,
        "vae_precision": work.precision,
        "lora_rank": work.rank,
        "target_modules": list(work.layers),
        "train_text_encoder": work.train_text_encoder,
        "batch_size": work.batch_size,
        "max_steps": 1000,  # the run is ended from outside
        "learning_rate": work.rate,
        "lr_scheduler": "constant",
        "min_snr_gamma": 0,
        "timestep_sampling": "uniform",
        "validation_pictures": 0,
        "seed": SEED,
        "output_dir": str(place / "run"),
        "save_steps": 1000,
        "sample_every": 0,
    }
    config = place / "config.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    return Command(sys.executable, ROOT / "train.py", ["--config", str(config)], stand_in=False)


def diffusers_example(peer: Peer, work: Work, base: Base, pictures: Pictures, place: Path) -> Command:
    shutil.rmtree(place / "run", ignore_errors=True)
    arguments = {
        "pretrained_model_name_or_path": base.folder,
        "train_data_dir": pictures.table,
        "cache_dir": place / "cache",
        "image_column": "image",
        "caption_column": "text",
        "resolution": work.side,
        "mixed_precision": "no" if work.precision == "fp32" else work.precision,
        "rank": work.rank,
        "train_batch_size": work.batch_size,
        "max_train_steps": 1000,
        "learning_rate": work.rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "seed": SEED,
        "output_dir": place / "run",
        "checkpointing_steps": 2000,
        "report_to": "tensorboard",
    }
    return Command(peer.python, peer.script, words(arguments), pictures.draws, environment=peer_environment(work, place))


def sd_scripts(peer: Peer, work: Work, base: Base, pictures: Pictures, place: Path) -> Command:
    shutil.rmtree(place / "run", ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    arguments = {
        "pretrained_model_name_or_path": base.file,
        "train_data_dir": pictures.kohya,
        "tokenizer_cache_dir": base.tokenizer_cache,
        "caption_extension": ".txt",
        "resolution": f"{work.side},{work.side}",
        "network_module": "networks.lora",
        "network_dim": work.rank,
        "network_alpha": work.rank,
        "train_batch_size": work.batch_size,
        "max_train_steps": 1000,
        "learning_rate": work.rate,
        "mixed_precision": "no" if work.precision == "fp32" else work.precision,
        "seed": SEED,
        "output_dir": place / "run",
        "output_name": "lora",
        "network_train_unet_only": not work.train_text_encoder,
        "cache_latents": work.cached_latents,
        "cache_latents_to_disk": work.cached_latents,
        "sdpa": work.cached_latents,
    }
    return Command(peer.python, peer.script, words(arguments), pictures.draws, environment=peer_environment(work, place))


def peer_environment(work: Work, place: Path) -> dict[str, str]:
    return {"ACCELERATE_USE_CPU": str(work.device == "cpu").lower(), "HF_HOME": str(place / "home")}
