"""A LoRA merged into an SDXL base of 6.9 GB: time and memory of our command, of diffusers and of sd-scripts, in turns.

    python benchmarks/merge_into_base.py --rounds 3 --update-docs \
        --sd-scripts sd-scripts/networks/sdxl_merge_lora.py --sd-python their-venv/bin/python

The base (random weights, original layout) and the LoRA (attention of U-Net and both text encoders) are made on the spot, and
everything is deleted in the end: 35 GB of disk are needed. Each merge is a process of its own. The system tells the most
memory that it ever held; that includes pages of files mapped into it, which the system can take back at any moment, so the
memory of its own (anonymous, looked at twenty times a second) stands beside it. diffusers has no command for this: it loads
the file, loads the LoRA, fuses and saves a folder. sd-scripts' script is not part of this repository.

After the last round every result is compared with base + LoRA, computed in float32 layer by layer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

from style_vs_diffusers import ROOT, processor, update_docs  # which makes src importable

TITLES = {
    "ours": "`lora-scripts merge`",
    "unchecked": "`lora-scripts merge --no-check`",
    "diffusers": "diffusers: load, fuse, save",
    "sd-scripts": "sd-scripts: `sdxl_merge_lora.py`",
}
POLL_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16", help="of the base and of all arithmetic")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sd-scripts", type=Path, help="networks/sdxl_merge_lora.py of a copy of sd-scripts")
    parser.add_argument("--sd-python", default=sys.executable, help="an interpreter that has what sd-scripts needs")
    parser.add_argument("--folder", type=Path, help="where the 35 GB go (default: the temporary folder)")
    parser.add_argument("--update-docs", action="store_true")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part[0]](*options.part[1:])
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        contest = Contest(Path(folder), options)
        text = contest.run()
    print("\n" + text)
    if options.update_docs:
        update_docs(text, "merge_into_base")


class Contest:
    """The files, and what each side took. This process stays small: the system counts it into what a child held."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.sides = [side for side in TITLES if side != "sd-scripts" or options.sd_scripts]
        self.measured: dict[str, list[dict[str, float]]] = {side: [] for side in self.sides}

    def run(self) -> str:
        subprocess.run(self._part("make", self.folder, self.options.dtype, str(self.options.rank)), check=True)
        for number in range(self.options.rounds):
            for side in self.sides[number % len(self.sides) :] + self.sides[: number % len(self.sides)]:
                _delete(self._output(side))
                taken = measured(self._command(side), self._environment(side))
                self.measured[side].append(taken)
                print(f"round {number + 1}, {side}: {json.dumps(taken)}", flush=True)
        errors = {}
        for side in self.sides:
            done = subprocess.run(
                self._part("check", self.folder, self._output(side)), check=True, capture_output=True, text=True
            )
            errors[side] = float(done.stdout)
        return self._table(errors)

    def _output(self, side: str) -> Path:
        return self.folder / (side if side == "diffusers" else f"{side}.safetensors")

    def _command(self, side: str) -> list[str]:
        base, lora, output = (str(path) for path in (_base(self.folder), _lora(self.folder), self._output(side)))
        if side == "diffusers":
            return self._part("diffusers", self.folder, self.options.dtype, output)
        if side == "sd-scripts":
            script, dtype = str(self.options.sd_scripts.resolve()), self.options.dtype
            return [
                self.options.sd_python, str(Path(__file__).resolve()), "--part", "sd-scripts", script,
                *("sd_model", base, "save_to", output, "models", lora, "ratios", "1.0"),
                *("precision", dtype, "save_precision", dtype),
            ]  # fmt: skip
        command = [sys.executable, "-m", "lora_scripts", "merge", "--base-model", base, "--lora", lora]
        return [*command, "--output", output, *(["--no-check"] if side == "unchecked" else [])]

    def _part(self, *words: object) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), "--part", *map(str, words)]

    def _environment(self, side: str) -> dict[str, str]:
        values = os.environ | {"OMP_NUM_THREADS": str(self.options.threads), "HF_HUB_OFFLINE": "1"}
        if side == "sd-scripts":
            networks = self.options.sd_scripts.resolve().parent
            return values | {"PYTHONPATH": os.pathsep.join(map(str, (networks.parent, networks)))}
        return values | {"PYTHONPATH": str(ROOT / "src")}

    def _table(self, errors: dict[str, float]) -> str:
        lines = [
            "| merge with | seconds | CPU seconds | memory at the peak | of its own | lost to rounding |",
            "|---|---|---|---|---|---|",
        ]
        for side in self.sides:
            rows = self.measured[side]
            cells = [_spread([row["wall_s"] for row in rows], 0), _spread([row["cpu_s"] for row in rows], 0)]
            cells += [_gb([row["peak_bytes"] for row in rows]), _gb([row["own_bytes"] for row in rows])]
            lines.append(f"| {TITLES[side]} | {' | '.join(cells)} | {errors[side]:.2%} |")
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
        count, dtype = self.options.rounds, self.options.dtype
        lines += [
            "",
            f"A LoRA of rank {self.options.rank} for the attention of U-Net and both text encoders, base and arithmetic of the other "
            f"two in {dtype}; {'once each' if count == 1 else f'{count} rounds in turns, the median (least to most)'}. Lost to rounding: "
            "size of the difference from base + LoRA, over the size of the LoRA's change. "
            f"{processor()}, threads per process: {self.options.threads}. {versions}.",
        ]
        return "\n".join(lines) + "\n"


def measured(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds and memory of one process, which must end well."""
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        own = _OwnMemory(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{said.read().decode()[-3000:]}")
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "own_bytes": own.most(),
    }


class _OwnMemory(threading.Thread):
    """Looks at a process's anonymous memory until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.path, self.bytes = Path(f"/proc/{pid}/status"), 0
        self.start()

    def run(self) -> None:
        while True:
            try:
                lines = self.path.read_text().splitlines()
            except OSError:
                return
            found = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)
            if found is None:
                return  # ended, and not yet waited for
            self.bytes = max(self.bytes, found * 1024)
            time.sleep(POLL_S)

    def most(self) -> int:
        self.join()
        return self.bytes


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if path.is_file():
        path.unlink()


def _spread(values: list[float], digits: int) -> str:
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.{digits}f}{spread}"


def _gb(values: list[float]) -> str:
    return f"{max(values) / 1e9:.1f} GB"


def _base(folder: Path) -> Path:
    return folder / "base.safetensors"


def _lora(folder: Path) -> Path:
    return folder / "ink.safetensors"


# What runs in processes of its own ------------------------------------------------------------------------------------


def make(folder: str, dtype: str, rank: str) -> None:
    """The base, the LoRA, and the small files that diffusers wants to know of a single file."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    from helpers.full_size import write_full_size
    from lora_scripts.adapter_files.reference import kohya_names, reference_layers
    from lora_scripts.adapters.weights import LoRATensors
    from lora_scripts.export.metadata import RunFacts, file_metadata
    from lora_scripts.export.writer import write_lora

    torch.manual_seed(0)
    write_full_size(_base(Path(folder)), "sdxl", {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    _write_configurations(Path(folder) / "configurations")
    weights = {}
    for name, row in reference_layers("sdxl").items():
        if "attn" in name and len(row.shape) == 2:
            out, inside = row.shape
            # The base's weights are of size 1 / sqrt(in); such a LoRA changes them by some 3 %.
            down = torch.randn(int(rank), inside) / inside**0.5
            up = torch.randn(out, int(rank)) * 0.03 / int(rank) ** 0.5
            weights[name] = LoRATensors(down, up, float(rank))
    facts = RunFacts("ink", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", rank=int(rank), alpha=float(rank))
    write_lora(_lora(Path(folder)), weights, file_metadata(facts), torch.float16, kohya_names("sdxl"))


def _write_configurations(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    from lora_scripts.models.clip_tokenizer import packaged_clip_tokenizer
    from lora_scripts.models.published import published_config

    index = {"_class_name": "StableDiffusionXLPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    classes = {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    }
    for part, (library, name) in classes.items():
        (folder / part).mkdir(parents=True)
        config = {"_class_name": name, "model_type": "clip_text_model"} | published_config(part, "sdxl")
        (folder / part / "config.json").write_text(json.dumps(config))
        index[part] = [library, name]
    for part in ("tokenizer", "tokenizer_2"):
        tokenizer = packaged_clip_tokenizer(published_config(part, "sdxl")["pad_token"])
        tokenizer.save_pretrained(folder / part)
        index[part] = ["transformers", type(tokenizer).__name__]
    EulerDiscreteScheduler.from_config(published_config("scheduler", "sdxl")).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))


def fuse_with_diffusers(folder: str, dtype: str, output: str) -> None:
    """As its documentation puts a LoRA into a model for good."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(_base(Path(folder))),
        config=str(Path(folder) / "configurations"),
        torch_dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[dtype],
        local_files_only=True,
    )
    pipeline.load_lora_weights(folder, weight_name=_lora(Path(folder)).name)
    pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(output)


def run_sd_scripts(script: str, *words: str) -> None:
    """The script as it is; where torchvision is missing, with a stand-in for what is imported and merging never uses."""
    import importlib.util
    import runpy
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    if importlib.util.find_spec("torchvision") is None:
        from transformers.utils import is_torchvision_available

        assert not is_torchvision_available()  # it remembers the answer, so it has to be asked for first
        sys.path.append(str(ROOT / "benchmarks" / "stand_ins"))
        import torchvision_transforms as transforms

        package = ModuleType("torchvision")
        package.__spec__ = ModuleSpec("torchvision", None)
        package.transforms = transforms  # type: ignore[attr-defined]
        sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}
    names, values = words[::2], words[1::2]
    sys.argv = [script, *(word for pair in zip(names, values, strict=True) for word in (f"--{pair[0]}", pair[1]))]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def check(folder: str, output: str) -> None:
    """Prints the size of the error of all changed layers over the size of their change."""
    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.models.layer_files import open_layer_files
    from lora_scripts.models.source import resolve_base_model

    before, after = (open_layer_files(resolve_base_model(str(path))) for path in (_base(Path(folder)), output))
    file = open_adapter_file(_lora(Path(folder)), before.shapes)
    wrong = wanted = 0.0
    for name, change in file.changes():
        delta = change.delta()
        error = after.weight(name) - before.weight(name) - delta
        wrong, wanted = wrong + float(error.square().sum()), wanted + float(delta.square().sum())
    print((wrong / wanted) ** 0.5)


PARTS = {"make": make, "diffusers": fuse_with_diffusers, "sd-scripts": run_sd_scripts, "check": check}


if __name__ == "__main__":
    main()
