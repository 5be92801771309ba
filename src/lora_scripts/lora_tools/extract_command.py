"""`lora-scripts extract`: the LoRA between a tuned checkpoint and its base."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.atomic_file import require_new_file
from lora_scripts.errors import ConfigError, ExportError
from lora_scripts.lora_tools.ranks import add_rank_arguments, rank_choice

if TYPE_CHECKING:
    from lora_scripts.lora_tools.extract import Extracted
    from lora_scripts.models.layer_files import LayerFiles

__all__ = ["add_arguments", "run"]

VERSIONS = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""`ss_base_model_version` by family, which the WebUI sorts by."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--tuned", required=True, help="the tuned checkpoint: a .safetensors file or diffusers folder")
    parser.add_argument("--base-model", required=True, help="the checkpoint that it was tuned from")
    parser.add_argument("--output", type=Path, required=True, help="the LoRA's .safetensors file")
    add_rank_arguments(parser)
    parser.add_argument(
        "--layers",
        choices=["attention", "linear", "all"],
        default="attention",
        help="attention (default), linear: all of the transformer blocks, all: residual blocks with their convolutions too",
    )
    parser.add_argument("--conv-rank", type=int, help="another rank for convolutions with kernels above 1x1")
    parser.add_argument("--no-text-encoders", action="store_true", help="the U-Net's layers alone")
    parser.add_argument("--save-precision", choices=["fp16", "bf16", "fp32"], default="fp16", help="default: fp16")
    parser.add_argument("--report", action="store_true", help="also print a line on every layer")
    parser.add_argument("--force", action="store_true", help="replace --output if it is there already")


def run(arguments: argparse.Namespace) -> int:
    """Extracts, writes and reads back; the exit code."""
    linear = rank_choice(arguments.rank, arguments.keep, arguments.max_rank)
    if arguments.conv_rank is not None and arguments.layers != "all":
        raise ConfigError(
            "--conv-rank: has an effect with --layers all alone; the other choices hold no such convolution."
        )
    conv = linear if arguments.conv_rank is None else rank_choice(arguments.conv_rank, None, None)
    inputs = [Path(name) for name in (arguments.tuned, arguments.base_model) if Path(name).exists()]
    require_new_file(arguments.output, inputs, force=arguments.force)

    import torch

    from lora_scripts.lora_tools.extract import chosen_layers, extract_lora, require_same_architecture
    from lora_scripts.lora_tools.finished import PRECISIONS, write_finished
    from lora_scripts.models.layer_files import open_layer_files
    from lora_scripts.models.source import resolve_base_model

    tuned, base = (
        open_layer_files(resolve_base_model(name, task="text-to-image"))
        for name in (arguments.tuned, arguments.base_model)
    )
    require_same_architecture(tuned, base)
    layers = chosen_layers(base.kohya_names, arguments.layers, text_encoders=not arguments.no_text_encoders)
    dtype = getattr(torch, PRECISIONS[arguments.save_precision])
    found = extract_lora(tuned, base, layers, linear, conv, dtype)
    _require_difference(found, tuned, base)
    names = {layer: base.kohya_names[layer] for layer in found.weights}
    proof = write_finished(arguments.output, found.weights, names, _texts(arguments, tuned, base, found), dtype)
    if arguments.report:
        print("\n".join(map(str, found.losses.cuts)))
    _say(arguments.output, found, proof)
    return 0


def _require_difference(found: Extracted, tuned: LayerFiles, base: LayerFiles) -> None:
    if found.weights:
        return
    names = f"{tuned.source.name} and {base.source.name}"
    if found.outside:
        raise ExportError(
            f"{names}: are equal in every layer asked for, and differ in others. Ask for more of them: --layers all, and "
            "without --no-text-encoders."
        )
    raise ExportError(
        f"{names}: hold the same weights, so there is no LoRA between them. Is the tuned one the right file?"
    )


def _texts(arguments: argparse.Namespace, tuned: LayerFiles, base: LayerFiles, found: Extracted) -> dict[str, str]:
    from lora_scripts.export.metadata import RunFacts, file_metadata
    from lora_scripts.lora_tools.finished import reworked_texts
    from lora_scripts.models.hashes import file_sha256
    from lora_scripts.models.sd_layout import LAYOUTS

    family, velocity = base.source.family, base.source.prediction_type == "v_prediction"
    rank = Counter(tensors.rank for tensors in found.weights.values()).most_common(1)[0][0]
    version = VERSIONS[family] + ("_v" if family == "sd2" and velocity else "")
    now = time.time()
    facts = RunFacts(
        output_name=arguments.output.stem,
        base_model_version=version,
        modelspec_architecture=f"{LAYOUTS[family].architecture}/lora",
        rank=rank,
        alpha=next(iter(found.weights.values())).alpha,
        base_model=base.source.title,
        base_model_hash=file_sha256(base.path)[:10] if base.path.is_file() else base.source.fingerprint[:10],
        is_v2=family == "sd2",
        prediction_type=base.source.prediction_type,
        resolution=(1024, 1024) if family == "sdxl" else (768, 768) if velocity else (512, 512),
        started_at=now,
        finished_at=now,
    )
    line = f"extracted from {tuned.source.title} less {base.source.title}, rank {found.losses.ranks}: {found.losses}"
    return reworked_texts(file_metadata(facts), arguments.output, found.weights, line)


def _say(output: Path, found: Extracted, proof: str) -> None:
    unchanged = f", {found.unchanged} more are equal in both" if found.unchanged else ""
    whole = found.covered + found.outside
    print(f"{output}: {len(found.weights)} layers of rank {found.losses.ranks}{unchanged}")
    print(f"Of these layers' difference: {found.losses}")
    if found.outside > 1e-6 * whole:
        print(
            f"{found.outside / whole:.1%} of the checkpoints' whole difference (squared norm) is in layers that were not asked "
            "for; --layers all takes in more of them."
        )
    print(proof)
    print(f"Look at it: lora-scripts inspect {output}")
