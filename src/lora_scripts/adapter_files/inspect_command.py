"""`lora-scripts inspect`: what a LoRA file is, how strong it is where, and which programs read it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_scripts.adapter_files.inspection import Inspection

__all__ = ["add_arguments", "run"]

_BAR = 24
_WIDTH = 14
_DTYPES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
_SPELLINGS = {
    "kohya": "kohya",
    "diffusers": "diffusers",
    "peft": "PEFT",
    "native": "the original model's paths",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("file", type=Path, help="a .safetensors file, or a PEFT folder")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for other programs")
    parser.add_argument("--base-model", help="also check that every layer fits this model (as base_model in a config)")


def run(arguments: argparse.Namespace) -> int:
    """Prints what was found; 2 when the file cannot be used as it is."""
    from lora_scripts.adapter_files.inspection import inspect_adapter

    found = inspect_adapter(arguments.file, _layers(arguments.base_model) if arguments.base_model else None)
    if arguments.json:
        print(json.dumps(found.as_json(), ensure_ascii=False, indent=2, allow_nan=False, default=str))
    else:
        print("\n".join(_lines(found)))
    for fault in found.faults:
        print(fault if str(arguments.file) in fault else f"{arguments.file}: {fault}", file=sys.stderr)
    return 2 if found.faults else 0


def _layers(base_model: str) -> dict[str, tuple[int, ...]]:
    """Layer names and shapes of a base model."""
    from lora_scripts.pipeline import list_targets

    rows = (line.split() for line in list_targets(base_model))
    return {name: tuple(map(int, shape.split("x"))) for name, shape in rows}


def _lines(found: Inspection) -> Iterator[str]:
    from lora_scripts.adapter_files.endings import KINDS

    file, header = found.file, found.header
    kinds = Counter(layer.kind for layer in file.layers.values())
    what = " and ".join(KINDS[kind] for kind, _ in kinds.most_common())
    yield f"{file.path}"
    yield f"{what} for {file.title}"
    yield ""
    where = Counter(layer.component for layer in file.layers.values())
    places = ", ".join(f"{_component(name)} {count}" for name, count in where.items())
    yield _row("layers", f"{len(file.layers)} ({places})")
    yield _row("names", _SPELLINGS[file.spelling])
    if file.ranks:
        yield _row("rank", _range(file.ranks))
    if file.alphas:
        yield _row("alpha", f"{_range(file.alphas)}{_scale(file.ranks, file.alphas)}")
    yield _row("numbers", ", ".join(_DTYPES.get(name, name) for name, _ in file.dtypes().most_common()))
    size = sum(part.path.stat().st_size for part in file.headers())
    yield _row("size", f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} KB")
    for title, text in (
        ("name", header.title),
        ("base model", header.base_model or file.base_model),
        ("trigger", header.trigger),
        ("frequent tags", ", ".join(header.tags)),
        ("trained", _trained(found)),
        ("made with", header.trainer),
        ("date", header.date),
    ):
        if text:
            yield _row(title, text)
    yield from _strength(found)
    yield from _readers(found)
    if found.notes:
        yield ""
        yield from (f"Note: {note}" for note in found.notes)


def _strength(found: Inspection) -> Iterator[str]:
    from lora_scripts.adapter_files.measure import block_norms

    blocks = block_norms(found.layers)
    strongest = found.strongest()
    if not strongest:
        return
    most = max(norm for norm, _ in blocks.values())
    width = max(len(block) for block in blocks)
    yield ""
    yield "Strength of the change (Frobenius norm at strength 1)"
    for block, (norm, count) in blocks.items():
        bar = "#" * round(_BAR * norm / most)
        yield f"  {block:<{width}}  {_aligned(norm, most)}  {bar:<{_BAR}}  {count} layer{'' if count == 1 else 's'}"
    yield ""
    yield "Strongest layers"
    yield from (f"  {_aligned(facts.norm or 0.0, strongest[0].norm or 1.0)}  {facts.name}" for facts in strongest)


def _readers(found: Inspection) -> Iterator[str]:
    yield ""
    if not found.verdicts:
        yield "Which programs read it: not known here for this model."
        return
    yield "Which programs read it"
    for verdict in found.verdicts:
        yield f"  {verdict.reader:<{_WIDTH}} {'yes' if verdict.ok else 'no:'} {verdict.reason}".rstrip()
        if verdict.way_on:
            yield f"  {'':<{_WIDTH}}     {verdict.way_on}"


def _aligned(value: float, most: float) -> str:
    """A number of a column whose largest is `most`, with as many decimals as give that one four digits."""
    decimals = min(8, max(0, 3 - math.floor(math.log10(most))))
    return f"{value:9.{decimals}f}"


def _row(title: str, text: str) -> str:
    return f"  {title:<{_WIDTH}} {text}"


def _component(name: str) -> str:
    from lora_scripts.adapter_files.measure import block_of

    return "U-Net" if name == "unet" else block_of(f"{name}.").removesuffix(", other layers")


def _range(values: Sequence[float]) -> str:
    if len(values) <= 3:
        return ", ".join(f"{value:g}" for value in values)
    return f"{values[0]:g} to {values[-1]:g} ({len(values)} different)"


def _scale(ranks: Sequence[int], alphas: Sequence[float]) -> str:
    return f" (scale {alphas[0] / ranks[0]:g})" if len(ranks) == len(alphas) == 1 else ""


def _trained(found: Inspection) -> str:
    header = found.header
    parts = [
        f"{count:,} {unit}{'' if count == 1 else 's'}"
        for count, unit in ((header.steps, "step"), (header.epochs, "epoch"), (header.pictures, "picture"))
        if count
    ]
    return ", ".join([*parts, *([f"at {header.resolution}"] if header.resolution else [])])
