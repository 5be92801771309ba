"""How fast captions are written: the labelling engine against a plain loop over pictures with transformers.

    python benchmarks/label.py [--pictures 6] [--rounds 2] [--candidates 1 5] [--precision fp32 half] [--threads 2]

Both sides run the same random BLIP of the published base size on the same pictures with the same number of tokens, in turns,
so that other work on the machine hits both alike. The plain loop is what a script on the web does: open a picture, run the
processor, call `generate`, decode. Times are seconds per picture. No network, no trained weights: speed does not depend on
what the weights say.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import BlipForConditionalGeneration, BlipProcessor  # noqa: E402

from helpers.tiny_captioners import write_full_size_blip  # noqa: E402
from lora_scripts.captioners.folders import quiet_libraries  # noqa: E402
from lora_scripts.captioners.label import LabelJob, LabelOptions, caption_all  # noqa: E402
from lora_scripts.captioners.protocol import CaptionerSettings  # noqa: E402
from lora_scripts.devices import describe_device  # noqa: E402

TOKENS = 20


class Silent:
    """A listener that says nothing."""

    def note(self, text: str) -> None: ...

    def start(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


def make_pictures(folder: Path, count: int) -> None:
    """Photographs in size, of smooth colours: 1600 x 1200 JPEG."""
    folder.mkdir()
    for number in range(count):
        small = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=92)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and seconds of processor time, of all threads."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def plain_loop(
    folder: Path, pictures: Path, dtype: torch.dtype, candidates: int, device: str
) -> Callable[[], tuple[float, float]]:
    """A run of the plain loop; its times, loading of the model not counted."""
    processor = BlipProcessor.from_pretrained(folder)
    model = BlipForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    sampling = {"do_sample": True, "top_p": 0.9, "num_return_sequences": candidates} if candidates > 1 else {}

    def run() -> None:
        for path in sorted(pictures.glob("*.jpg")):
            inputs = processor(Image.open(path).convert("RGB"), return_tensors="pt").to(device, dtype)
            out = model.generate(**inputs, min_new_tokens=TOKENS, max_new_tokens=TOKENS, **sampling)
            processor.batch_decode(out, skip_special_tokens=True)

    return lambda: timed(run)


def engine(
    folder: Path, pictures: Path, precision: str, candidates: int, device: str
) -> Callable[[], tuple[float, float]]:
    """A run of the labelling engine; its times, loading of the model not counted, writing the table counted."""
    settings = CaptionerSettings(num_candidates=candidates, min_tokens=TOKENS, max_tokens=TOKENS)
    options = LabelOptions(
        pictures, pictures / "metadata.csv", "blip", str(folder), settings, device=device, precision=precision
    )

    def run() -> tuple[float, float]:
        for old in pictures.glob("metadata*"):
            old.unlink()
        job = LabelJob(options, Silent())
        captioner, where = job.load_captioner()
        return timed(lambda: (caption_all(job, captioner, where.type), job.sheet.finish()))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--precision", nargs="+", default=["fp32", "half"], choices=("fp32", "half"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    quiet_libraries()
    half = ("fp16", torch.float16) if given.device.startswith("cuda") else ("bf16", torch.bfloat16)
    print(
        f"{describe_device(torch.device(given.device))}; BLIP base, random weights; {given.pictures} pictures, {TOKENS} tokens"
    )
    with tempfile.TemporaryDirectory() as place:
        folder = write_full_size_blip(Path(place) / "blip")
        pictures = Path(place) / "pictures"
        make_pictures(pictures, given.pictures)
        print("candidates  format  plain loop (processor time)  engine (processor time)  ratio (processor time)")
        for candidates in given.candidates:
            for precision, dtype in [half if name == "half" else ("fp32", torch.float32) for name in given.precision]:
                loop = plain_loop(folder, pictures, dtype, candidates, given.device)
                ours = engine(folder, pictures, precision, candidates, given.device)
                runs = [(loop(), ours()) for _ in range(given.rounds)]
                (slow, slow_cpu), (fast, fast_cpu) = (
                    [statistics.median(values) / given.pictures for values in zip(*side, strict=True)]
                    for side in zip(*runs, strict=True)
                )
                print(
                    f"{candidates:>10}  {precision:>6}  {slow:>8.2f} s ({slow_cpu:>5.2f} s)        "
                    f"{fast:>8.2f} s ({fast_cpu:>5.2f} s)      {slow / fast:>5.2f} ({slow_cpu / fast_cpu:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
