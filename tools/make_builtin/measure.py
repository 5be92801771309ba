"""Measures the built-in models on freshly drawn scenes that no training saw, and writes quality.json and quality.md.

    python tools/make_builtin/measure.py --models FOLDER [--quick]

Without --models the weights inside the package are measured. Under six minutes on two quiet CPU cores, --quick under
one and a half.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from scenes import KINDS, LOOKS, world

from lora_scripts.builtin.judges import Judges, load_judges
from lora_scripts.builtin.weights import builtin_path

FIRST_SEED = 40_000_000
"""No training or test set uses seeds from here on."""

Scenes = list[world.Scene]
Figures = dict[str, float]


def draw_fresh(count: int, style: str | None = None, offset: int = 0) -> tuple[Scenes, list[Image.Image]]:
    """Held-out scenes and their pictures."""
    scenes, pictures = [], []
    for i in range(count):
        seed = FIRST_SEED + offset + i
        scene = world.random_scene(np.random.default_rng(seed), "held_out")
        scenes.append(scene)
        pictures.append(world.draw(scene, seed, style))
    return scenes, pictures


def share_right(read: list[dict[str, object]], scenes: Scenes) -> Figures:
    """Share of attributes read rightly, per kind and over all."""
    shares = {k: float(np.mean([r[k] == getattr(s, k) for r, s in zip(read, scenes, strict=True)])) for k in KINDS}
    return {**shares, "overall": float(np.mean(list(shares.values())))}


def measure_judges(judges: Judges, count: int) -> dict[str, object]:
    """Accuracy of both classifiers on plain pictures and in every style."""
    rows: dict[str, object] = {}
    for k, look in enumerate(LOOKS):
        number = count if k == 0 else count // 4
        scenes, pictures = draw_fresh(number, look if k else None, offset=10_000 * k)
        style = float(np.mean([answer == look for answer in judges.read_style(pictures)]))
        rows[look] = {**share_right(judges.read_attributes(pictures), scenes), "style": style}
    return rows


def measure_sd(folder: Path, judges: Judges, count: int, sheet: Path) -> Figures:
    """Attributes that the judges read in mini-sd's pictures of held-out prompts; writes a contact sheet."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(FIRST_SEED)
    scenes = [world.random_scene(rng, "held_out") for _ in range(count)]
    prompts = [world.caption(scene, rng) for scene in scenes]
    pictures: list[Image.Image] = []
    for start in range(0, count, 12):
        some = prompts[start : start + 12]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(some))]
        out = pipeline(some, num_inference_steps=20, guidance_scale=5.0, height=128, width=128, generator=generators)
        pictures.extend(out.images)
    canvas = Image.new("RGB", (12 * 128, -(-min(count, 48) // 12) * 128))
    for i, picture in enumerate(pictures[:48]):
        canvas.paste(picture, (i % 12 * 128, i // 12 * 128))
    canvas.save(sheet)
    figures = share_right(judges.read_attributes(pictures), scenes)
    figures["read_as_plain"] = float(np.mean([s == "plain" for s in judges.read_style(pictures)]))
    return figures


def _jpeg(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def _crop(picture: Image.Image) -> Image.Image:
    """Five per cent off each side, scaled back."""
    edge = round(picture.width * 0.05)
    inner = picture.crop((edge, edge, picture.width - edge, picture.height - edge))
    return inner.resize(picture.size, Image.Resampling.BICUBIC)


DAMAGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "clean": lambda p: p,
    "JPEG 60": _jpeg,
    "15 % brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.15),
    "15 % darker": lambda p: ImageEnhance.Brightness(p).enhance(0.85),
    "10 % cropped": _crop,
    "all of them": lambda p: _jpeg(ImageEnhance.Brightness(_crop(p)).enhance(0.85)),
}


class GreedyCaptioner:
    """mini-blip, loaded and run as any user of transformers would."""

    def __init__(self, root: Callable[[str], Path]) -> None:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.processor = BlipProcessor.from_pretrained(root("mini-blip"))
        self.blip = BlipForConditionalGeneration.from_pretrained(root("mini-blip"), dtype=torch.float32).eval()

    @torch.inference_mode()
    def greedy(self, pictures: list[Image.Image]) -> list[str]:
        """One caption a picture."""
        x = self.processor(images=pictures, return_tensors="pt").pixel_values
        ids = self.blip.generate(pixel_values=x, max_new_tokens=24, num_beams=1, do_sample=False)
        return self.processor.batch_decode(ids, skip_special_tokens=True)


def measure_captions(captioner: GreedyCaptioner, count: int) -> dict[str, Figures]:
    """Attributes that greedy captions name rightly, clean and damaged, and in the styles."""
    scenes, pictures = draw_fresh(count, offset=200_000)
    rows = {}
    for name, harm in DAMAGES.items():
        rows[name] = share_right([world.read_caption(c) for c in captioner.greedy([harm(p) for p in pictures])], scenes)
    for k, style in enumerate(world.STYLES):
        scenes, pictures = draw_fresh(count // 4, style, offset=210_000 + 1000 * k)
        rows[style] = share_right([world.read_caption(c) for c in captioner.greedy(pictures)], scenes)
    return rows


def measure_rerank(root: Callable[[str], Path], count: int) -> dict[str, Figures]:
    """Captions of damaged pictures as `label --captioner blip` and `clip-blip` write them, the latter with both choosers.

    Returns:
        By row of the table: attributes right, and the difference to greedy with its standard error over pictures.
    """
    from lora_scripts.captioners.blip import Blip
    from lora_scripts.captioners.clip_rerank import ClipBlip
    from lora_scripts.captioners.protocol import CaptionerSettings

    scenes, pictures = draw_fresh(count, offset=300_000)
    pictures = [DAMAGES["all of them"](p) for p in pictures]
    device, model = torch.device("cpu"), str(root("mini-blip"))
    captioners = {
        "greedy (`--captioner blip`)": Blip.load(model, device, torch.float32, CaptionerSettings()),
        **{
            f"best of five by {label} (`--captioner clip-blip`)": ClipBlip.load(
                model, device, torch.float32, CaptionerSettings(rank_model=str(root(name)))
            )
            for name, label in (("mini-blip-itm", "the matching head"), ("mini-clip", "mini-clip"))
        },
    }
    right: dict[str, np.ndarray] = {}
    for name, captioner in captioners.items():
        texts = []
        for start in range(0, count, 32):
            some = [captioner.prepare(picture) for picture in pictures[start : start + 32]]
            keys = [str(start + i) for i in range(len(some))]
            texts += [candidates.texts[0] for candidates in captioner.caption(some, keys)]
        read = [world.read_caption(text) for text in texts]
        right[name] = np.array([[r[k] == getattr(s, k) for k in KINDS] for r, s in zip(read, scenes, strict=True)])
    greedy = next(iter(right.values())).mean(1)
    return {
        name: {
            "overall": float(hits.mean()),
            "gain": float((hits.mean(1) - greedy).mean()),
            "gain_error": float((hits.mean(1) - greedy).std(ddof=1) / count**0.5),
        }
        for name, hits in right.items()
    }


def markdown(result: dict[str, object]) -> str:
    """The figures as tables."""
    columns = [*KINDS, "overall"]

    def table(title: str, rows: dict[str, Figures], extra: tuple[str, ...] = ()) -> list[str]:
        names = [*columns, *extra]
        lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for name, row in rows.items():
            cells = (f"{100 * row[n]:.1f} %" if n in row else "" for n in names)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return [*lines, ""]

    lines = [
        f"Measured on {result['scenes']} held-out scenes drawn for the purpose, {result['seconds']:.0f} s on this machine.",
        "",
    ]
    lines += table("prompted attributes read in mini-sd's pictures", {"mini-sd": result["mini-sd"]})
    lines += table("judges", result["judges"], ("style",))
    lines += table("attributes named by mini-blip", result["mini-blip"])
    lines += ["| captions of damaged pictures | attributes right | against greedy |", "|---|---|---|"]
    for name, row in result["rerank"].items():
        gain = f"{100 * row['gain']:+.1f} +- {100 * row['gain_error']:.1f} points" if row["gain_error"] else ""
        lines.append(f"| {name} | {100 * row['overall']:.1f} % | {gain} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the command line, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", type=Path, default=None, help="folder of mini-sd/, mini-blip/, ... (default: the package's)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="where quality.json and quality.md go (default: --models)"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the pictures")
    given = parser.parse_args()
    out = given.out or given.models or Path()
    out.mkdir(parents=True, exist_ok=True)

    def root(name: str) -> Path:
        return given.models / name if given.models else builtin_path(name)

    part = 4 if given.quick else 1
    start = time.time()
    judges = load_judges(root("judges"))
    result: dict[str, object] = {"scenes": 96 // part}
    result["judges"] = measure_judges(judges, 400 // part)
    result["mini-sd"] = measure_sd(root("mini-sd"), judges, 96 // part, out / "mini-sd.png")
    captioner = GreedyCaptioner(root)
    result["mini-blip"] = measure_captions(captioner, 160 // part)
    result["rerank"] = measure_rerank(root, 480 // part)
    result["seconds"] = time.time() - start
    (out / "quality.json").write_text(json.dumps(result, indent=2))
    (out / "quality.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
