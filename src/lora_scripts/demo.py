"""`lora-scripts demo`: the whole job on made-up pictures and built-in models, measured by judges that training never sees.

Nothing in here is special to the demo but the pictures and the measuring: captions, training, previews, files and report
come from the same commands that a user runs on pictures of their own.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig
from lora_scripts.errors import ConfigError, DataError, did_you_mean
from lora_scripts.report.facts import Measurement

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.builtin.world import Scene

__all__ = ["Reading", "measure", "open_demo_folder", "percent", "run_demo", "share"]

NUM_PICTURES = 24
NUM_MEASURED = 48
BASE_MODEL = "builtin:mini-sd"
GUIDANCE = 2.5
"""Classifier-free guidance that suits the small model; higher values overdraw its contrasts."""


@dataclass(frozen=True)
class Reading:
    """What the judges read in pictures of the same prompts and seeds, without and with the LoRA; shares 0..1."""

    style_before: float
    style_after: float
    attributes_before: float
    attributes_after: float

    @property
    def attributes_kept(self) -> float:
        """Attributes read right with the LoRA, as a share of those read right without it."""
        return self.attributes_after / self.attributes_before if self.attributes_before else 0.0

    def measurements(self, style: str) -> list[Measurement]:
        """The figures for people."""
        kept = f"subject, colour, place, time, count; {self.attributes_kept:.0%} of before"
        return [
            Measurement(
                f"read as {style}",
                percent(self.style_before),
                percent(self.style_after),
                "by a judge that training never sees",
            ),
            Measurement(
                "prompted attributes read right",
                percent(self.attributes_before),
                percent(self.attributes_after),
                kept,
            ),
        ]


def run_demo(output: Path, style: str = "ink wash", seed: int = 42) -> int:
    """Draws, labels, trains, renders, measures and reports into `output`; the exit code.

    Raises:
        ConfigError: no such style.
        DataError: the folder holds something else.
    """
    from lora_scripts.builtin.world import STYLES
    from lora_scripts.captioners import command as label

    if style not in STYLES:
        raise ConfigError(
            f"--style {style}: no such style.{did_you_mean(style, STYLES)} There are: {', '.join(STYLES)}."
        )
    began = time.monotonic()
    open_demo_folder(output)

    pictures = output / "pictures"
    print(
        f"1. Drawing {NUM_PICTURES} pictures in the style {style!r}, which the base model has never seen ...",
        flush=True,
    )
    draw_pictures(pictures, style, seed)

    print("2. Writing captions ...", flush=True)
    parser = argparse.ArgumentParser()
    label.add_arguments(parser)
    table = pictures / "metadata.csv"
    label.run(parser.parse_args(["--input", str(pictures), "--output", str(table), "--model", "builtin:mini-blip"]))

    print("3. Training ...", flush=True)
    if style == "ink wash":
        print(
            "   The check before it will point at the red seal in every corner. Here it belongs to the style; "
            "a watermark on your own pictures should be painted away.",
            flush=True,
        )
    config = demo_config(output, style, seed)
    shutil.rmtree(config.output_dir, ignore_errors=True)  # an older demo's run; a new one begins at the beginning
    from lora_scripts.train_command import STOPPED, train_and_report

    outcome = train_and_report(config)
    if not outcome.complete:
        return STOPPED

    print(f"4. Rendering {NUM_MEASURED} prompts without and with the LoRA, and measuring ...", flush=True)
    file = config.output_dir / f"{config.name}.safetensors"
    reading, before_after = measure(config.base_model, file, style, seed)
    picture = output / "before_after.png"
    before_after.save(picture)

    from lora_scripts.report.build import build_report

    report = build_report(config, outcome, reading.measurements(style))
    print()
    for figure in reading.measurements(style):
        print(f"   {figure.label}: {figure.before} before, {figure.after} after ({figure.note})")
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Look at:")
    for path, what in ((picture, "the same prompts before and after"), (report, "the whole story"), (file, "the LoRA")):
        print(f"   {path}   {what}")
    print(
        "\nA chat model instead of pictures: lora-scripts demo --task text-generation --output demo-chat\n"
        "\nNow with your own pictures:\n"
        "   lora-scripts label --input MY_PICTURES --output MY_PICTURES/metadata.csv\n"
        "   lora-scripts train --config configs/my_lora_config.yaml   (see configs/ for templates)"
    )
    return 0


def open_demo_folder(output: Path) -> None:
    """Makes the folder, or takes an older demo's; raises DataError when it holds something else."""
    mark = output / "demo.txt"
    if output.exists() and any(output.iterdir()) and not mark.is_file():
        raise DataError(f"{output}: is not empty and was not made by the demo. Name another folder with --output.")
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text("This folder was made by `lora-scripts demo`; it can be deleted.\n", "utf-8")


def draw_pictures(folder: Path, style: str, seed: int) -> None:
    """Fills the folder with pictures of one style; an older demo's pictures and captions go."""
    import numpy as np

    from lora_scripts.builtin.world import draw, random_scene

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file():
            old.unlink()
    rng = np.random.default_rng(seed)
    for number in range(NUM_PICTURES):
        draw(random_scene(rng), seed=seed * 1000 + number, style=style).save(folder / f"{number + 1:02d}.png")


def demo_config(output: Path, style: str, seed: int) -> RunConfig:
    """The run's settings; also written to the folder as a YAML that `lora-scripts train` takes."""
    import yaml

    name = style.replace(" ", "_")
    settings = {
        "train_data_dir": (output / "pictures").as_posix(),
        "metadata_path": (output / "pictures" / "metadata.csv").as_posix(),
        "base_model": BASE_MODEL,
        "output_dir": (output / name).as_posix(),
        "trigger_word": style,
        # A small model has little to spare: more of its layers, a higher rank and larger steps than Stable Diffusion needs.
        "lora_rank": 16,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
        "batch_size": 8,
        "max_steps": 400,
        "learning_rate": 3e-3,
        "caption_dropout": 0.1,
        "save_steps": 100,
        "seed": seed,
        "sample_guidance": GUIDANCE,
        "sample_prompts": [
            f"{style}, {text}"
            for text in (
                "a red cat on the beach in daylight",
                "two blue sailboats by the lake at sunset",
                "a green elephant in the snow at night",
                "a yellow teapot in the forest in the rain",
            )
        ],
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (output / "demo.yaml").write_text(
        f"# The settings of the demo's run: lora-scripts train --config {output}/demo.yaml\n{text}", "utf-8"
    )
    return RunConfig.model_validate(settings)


def measure(base_model: str, file: Path, style: str, seed: int, count: int = NUM_MEASURED) -> tuple[Reading, Image]:
    """What the judges read without and with the LoRA file, on prompts of scenes drawn afresh, and a picture of both.

    The prompts hold the trigger word in both cases, so the difference is the LoRA's alone.
    """
    import numpy as np
    import torch

    from lora_scripts.builtin.judges import load_judges
    from lora_scripts.builtin.world import caption, random_scene
    from lora_scripts.export.names import layer_shapes
    from lora_scripts.export.reader import read_lora_file
    from lora_scripts.families.protocol import SampleRequest
    from lora_scripts.models.source import resolve_base_model
    from lora_scripts.models.stable_diffusion import load_stable_diffusion
    from lora_scripts.sampling.denoise import render
    from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA

    rng = np.random.default_rng(seed + 1_000_003)  # other scenes than those that were trained
    scenes = [random_scene(rng) for _ in range(count)]
    size = 128
    requests = [
        SampleRequest(f"{style}, {caption(scene, rng)}", seed=seed + number, guidance=GUIDANCE, width=size, height=size)
        for number, scene in enumerate(scenes)
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = load_stable_diffusion(resolve_base_model(base_model), device, torch.float32)
    components = parts.components
    lora = read_lora_file(file, layer_shapes(components))
    with torch.no_grad():
        before = render(parts, requests, device, batch_size=16)
        with LoRASet(components, [WeightedLoRA(lora.weights)]):
            after = render(parts, requests, device, batch_size=16)
    judges = load_judges()
    result = Reading(
        share(found == style for found in judges.read_style(before)),
        share(found == style for found in judges.read_style(after)),
        _attributes_right(judges.read_attributes(before), scenes),
        _attributes_right(judges.read_attributes(after), scenes),
    )
    return result, side_by_side(before[:6], after[:6], [request.prompt for request in requests[:6]])


def percent(share: float) -> str:
    """`93 %`."""
    return f"{share * 100:.0f} %"


def share(hits: Iterable[object]) -> float:
    """The part of them that is true, 0..1."""
    values = [bool(hit) for hit in hits]
    return sum(values) / len(values)


def _attributes_right(found: Sequence[Mapping[str, object]], scenes: Sequence[Scene]) -> float:
    """Share of all prompted attributes that were read as prompted."""
    return share(read[kind] == getattr(scene, kind) for read, scene in zip(found, scenes, strict=True) for kind in read)


def side_by_side(before: Sequence[Image], after: Sequence[Image], prompts: Sequence[str]) -> Image:
    """Two rows of pictures, without above and with below, each prompt written under its column."""
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    side, gap, left, foot = 256, 12, 110, 64
    width = left + len(before) * (side + gap)
    sheet = PILImage.new("RGB", (width, 2 * (side + gap) + gap + foot), "white")
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(15)
    for row, (title, images) in enumerate((("without", before), ("with LoRA", after))):
        top = gap + row * (side + gap)
        pen.text((left - gap, top + side // 2), title, "black", large, anchor="rm")
        for column, image in enumerate(images):
            sheet.paste(image.resize((side, side), PILImage.Resampling.LANCZOS), (left + column * (side + gap), top))
    for column, prompt in enumerate(prompts):
        words, lines = prompt.split(), [""]
        for word in words:
            if pen.textlength(f"{lines[-1]} {word}", small) > side:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((left + column * (side + gap), 2 * (side + gap) + gap), "\n".join(lines[:3]), "black", small)
    return sheet
