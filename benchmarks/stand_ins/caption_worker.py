"""One side of `suite/captions.py`: captions one folder of pictures after another, each when it is told to.

python benchmarks/stand_ins/caption_worker.py JOB.json
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gate import Gate

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "src")]

GATE = Gate()  # before the libraries have printed anything

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from lora_scripts.captioners.folders import quiet_libraries
from lora_scripts.captioners.label import LabelJob, LabelOptions, caption_all
from lora_scripts.captioners.protocol import CaptionerSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Silent:
    """A listener that says nothing."""

    def note(self, text: str) -> None: ...

    def start(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


def plain_loop(job: Mapping[str, Any]) -> Callable[[Path], None]:
    """Captions a folder picture by picture."""
    dtype, tokens, candidates = DTYPES[job["precision"]], job["tokens"], job["candidates"]
    processor = BlipProcessor.from_pretrained(job["model"])
    model = BlipForConditionalGeneration.from_pretrained(job["model"], dtype=dtype).to(job["device"]).eval()
    sampling = {"do_sample": True, "top_p": 0.9, "num_return_sequences": candidates} if candidates > 1 else {}

    def run(folder: Path) -> None:
        for path in sorted(folder.glob("*.jpg")):
            inputs = processor(Image.open(path).convert("RGB"), return_tensors="pt").to(job["device"], dtype)
            out = model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, **sampling)
            processor.batch_decode(out, skip_special_tokens=True)

    return run


def engine(job: Mapping[str, Any]) -> Callable[[Path], None]:
    """Captions a folder with the labelling engine, writing its table too."""
    settings = CaptionerSettings(num_candidates=job["candidates"], min_tokens=job["tokens"], max_tokens=job["tokens"])
    loaded: list[Any] = []

    def run(folder: Path) -> None:
        options = LabelOptions(
            folder,
            folder / "metadata.csv",
            "blip",
            job["model"],
            settings,
            device=job["device"],
            precision=job["precision"],
        )
        label_job = LabelJob(options, Silent())
        loaded[:] = loaded or label_job.load_captioner()  # with the first folder
        caption_all(label_job, loaded[0], loaded[1].type)
        label_job.sheet.finish()

    return run


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    quiet_libraries()
    caption = (engine if job["ours"] else plain_loop)(job)
    for folder in map(Path, job["pictures"]):
        caption(folder)
        facts: dict[str, Any] = {"num_captioned": len(list(folder.glob("*.jpg")))}
        if job["device"].startswith("cuda"):
            torch.cuda.synchronize()
            facts["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        GATE.tell(**facts)
        GATE.pause()


if __name__ == "__main__":
    main()
