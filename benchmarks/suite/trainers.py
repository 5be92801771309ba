"""How each trainer is told to train the same: ours, diffusers' LoRA example, and sd-scripts' `train_network.py`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite import ROOT, STAND_INS
from suite.materials import SEED, Base, Pictures
from suite.turns import Stepper

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Work:
    """What is trained.

    Attributes:
        family: as `materials.make_base` takes it.
        side: of the pictures, pixels.
        layers: that get an adapter, as our `target_modules`.
        init: what lora_A begins with, as our `lora_init`; the peer's own way, so that both learn alike.
        cached: latents, and what the text encoders say where none is trained; of sd-scripts alone, because ours always
            caches them and the example of diffusers never does.
        sdpa: torch's fused attention in place of one that is written out; of sd-scripts alone.
    """

    family: str
    side: int
    batch_size: int
    layers: tuple[str, ...] = ATTENTION
    init: str = "gaussian"
    train_text_encoder: bool = False
    cached: bool = False
    sdpa: bool = False
    rank: int = 8
    rate: float = 1e-4
    precision: str = "bf16"
    device: str = "cpu"

    @property
    def is_sdxl(self) -> bool:
        return self.family.endswith("sdxl")


@dataclass(frozen=True)
class Peer:
    """Another project.

    Attributes:
        kind: "diffusers" or "sd-scripts".
        folder: with its scripts.
        python: the interpreter that has what it needs.
    """

    kind: str
    folder: Path
    python: str = sys.executable


@dataclass(frozen=True)
class Command:
    """How a trainer is started: `python script arguments`.

    Attributes:
        draws: a file of `equal_draws.py`, for a trainer that is not ours.
        stand_in: whether torchvision may be served where it is missing.
        budget_gb: that torch is held to on a GPU, in 10^9 bytes; None for all there is.
    """

    python: str
    script: Path
    arguments: list[str]
    draws: Path | None = None
    stand_in: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    budget_gb: float | None = None

    def start(self, name: str, place: Path, threads: int) -> Stepper:
        """The trainer, stopped after its first step."""
        place.mkdir(parents=True, exist_ok=True)
        job = {"threads": threads, "draws": str(self.draws) if self.draws else None, "stand_in": self.stand_in}
        job["budget_gb"] = self.budget_gb
        (place / "job.json").write_text(json.dumps(job) + "\n", "utf-8")
        words = [self.python, STAND_INS / "watched.py", place / "job.json", self.script, *self.arguments]
        return Stepper(name, list(map(str, words)), place, threads, self.environment)


KINDS = {
    "diffusers": ("train_text_to_image_lora.py", "train_text_to_image_lora_sdxl.py"),
    "sd-scripts": ("train_network.py", "sdxl_train_network.py"),
}
"""Of each project: what trains a LoRA for Stable Diffusion 1, and for SDXL."""


def find_peer(text: str) -> Peer:
    """The peer at `PATH` or `PATH=PYTHON`; PATH is a checkout, or the folder of the scripts, or one of them.

    Raises:
        ValueError: there is no such script.
    """
    path, _, python = text.partition("=")
    given = Path(path).expanduser().resolve()
    for folder in (given, given / "examples" / "text_to_image", given.parent):
        for kind, (script, _) in KINDS.items():
            if (folder / script).is_file():
                return Peer(kind, folder, python or sys.executable)
    wanted = " nor ".join(scripts[0] for scripts in KINDS.values())
    raise ValueError(f"--peers {path}: neither {wanted} is there")


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
        "base_model": str(base.file),
        "device": work.device,
        "mixed_precision": work.precision,
        "vae_precision": work.precision,
        "lora_rank": work.rank,
        "lora_init": work.init,
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
    return peer_command(peer, work, arguments, pictures, place)


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
        "no_half_vae": work.is_sdxl,
        "seed": SEED,
        "output_dir": place / "run",
        "output_name": "lora",
        "network_train_unet_only": not work.train_text_encoder,
        "cache_latents": work.cached,
        "cache_latents_to_disk": work.cached,
        "sdpa": work.sdpa,
    }
    if work.cached and work.is_sdxl:
        arguments |= {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True}
    return peer_command(peer, work, arguments, pictures, place)


def peer_command(peer: Peer, work: Work, arguments: Mapping[str, Any], pictures: Pictures, place: Path) -> Command:
    script = peer.folder / KINDS[peer.kind][work.is_sdxl]
    environment = {"ACCELERATE_USE_CPU": str(work.device == "cpu").lower(), "HF_HOME": str(place / "home")}
    return Command(peer.python, script, words(arguments), pictures.draws, environment=environment)


def command_of(peer: Peer | None, work: Work, base: Base, pictures: Pictures, place: Path) -> Command:
    """The trainer's, ours for None; what an earlier run has left at its place is taken away, caches are not."""
    if peer is None:
        return ours(work, base, pictures, place)
    return {"diffusers": diffusers_example, "sd-scripts": sd_scripts}[peer.kind](peer, work, base, pictures, place)


def forget_caches(pictures: Pictures, place: Path) -> None:
    """What a trainer has kept of earlier runs, its own folder and files beside the pictures."""
    shutil.rmtree(place, ignore_errors=True)
    for file in pictures.kohya.rglob("*.npz"):
        file.unlink()
