"""`lora-scripts sample`: prompts with `<lora:NAME:0.7>` to pictures, or a grid of prompt x checkpoint x weight.

What the options mean for a language model is in `answering/sample_command.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.answering.chat_command import add_answer_arguments
from lora_scripts.errors import ConfigError
from lora_scripts.sampling.pictures import Origin, check_folder, lora_hash, save_grid, save_picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_scripts.families.protocol import SampleRequest
    from lora_scripts.models.source import BaseModel
    from lora_scripts.sampling.grid import Group
    from lora_scripts.sampling.lora_set import WeightedLoRA

__all__ = ["add_arguments", "run"]

_DEFAULT_WEIGHTS = "0,0.5,0.7,1"
_MOST_PICTURES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--base-model", required=True, help="file, folder, hub id or a built-in name such as builtin:mini-sd"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help='"a fox <lora:my_style:0.7>"; may be given several times'
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt in each line")
    parser.add_argument(
        "--output", type=Path, help="folder for the pictures (default: samples); for answers a .md or .jsonl file"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the first result of each prompt (default: 42)")
    parser.add_argument("--count", type=int, default=1, help="results of each prompt, with seeds counting up")
    parser.add_argument("--device", default="auto", help="auto (default), cuda, cuda:1, mps or cpu")
    parser.add_argument("--download", action="store_true", help="allow fetching --base-model from the hub")
    _add_picture_arguments(parser.add_argument_group("pictures"))
    add_answer_arguments(parser.add_argument_group("language models"))


def _add_picture_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--lora-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where LoRA names are looked up; may be given several times (default: every folder in ./output)",
    )
    parser.add_argument("--negative", default="", help="what is not to be in the picture")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--cfg", type=float, default=7.0, help="guidance scale (default: 7; 1 turns it off)")
    parser.add_argument(
        "--size", default="", metavar="WxH", help="such as 512x768 (default: what the model was made for)"
    )
    parser.add_argument("--sampler", default="", help="DPM++ 2M (default), DPM++ 2M Karras, Euler, DDIM")
    parser.add_argument("--clip-skip", type=int, default=1, help="1 is the text encoder's last layer (default)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures rendered at once (default: 4)")
    parser.add_argument("--grid", action="store_true", help="also put all pictures into one, with labels")
    parser.add_argument(
        "--checkpoints",
        metavar="DIR|PATTERN",
        help="compare the LoRAs of a run's output folder, or of a pattern, on every prompt; makes a grid",
    )
    parser.add_argument(
        "--weights", metavar="W,W,...", help=f"weights to compare with --checkpoints ({_DEFAULT_WEIGHTS})"
    )


@dataclass(frozen=True)
class _Job:
    """One picture: what is asked for, and the LoRA files with (UNet, text encoder) weights that are to be at work.

    Attributes:
        shown: the prompt as it goes into the picture, tags included.
    """

    request: SampleRequest
    loras: tuple[tuple[Path, float, float], ...]
    shown: str


@dataclass(frozen=True)
class _Sheet:
    """The jobs as rows and columns of a grid."""

    rows: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    cells: list[list[_Job]] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Renders pictures or asks for answers, whatever the base model makes; the exit code.

    Raises:
        ConfigError: an option is wrong or does not go with the base model, or a LoRA name is unknown.
        ModelError: the base model or a LoRA cannot be used.
        DataError: the output cannot be written.
    """
    prompts = _prompts(args)
    _checked(args)
    from lora_scripts.families import family_class
    from lora_scripts.models.source import resolve_base_model

    # Only what is to be fetched must be known beforehand: pictures and texts have models of different layouts.
    expected = "text-generation" if args.lora and args.download else None
    source = resolve_base_model(args.base_model, allow_download=args.download, task=expected)
    task = family_class(source.family).task
    _refuse_options_without_effect(args, task)
    if task == "text-generation":
        from lora_scripts.answering.sample_command import sample_answers

        return sample_answers(args, prompts)
    args.output = args.output or Path("samples")
    return _sample_pictures(args, prompts, source)


def _sample_pictures(args: argparse.Namespace, prompts: Sequence[str], source: BaseModel) -> int:
    weights = _checked(args)
    from lora_scripts.devices import choose_device
    from lora_scripts.sampling.denoise import DEFAULT_SAMPLER, check_sampler

    device = choose_device(args.device)
    sampler = check_sampler(args.sampler or DEFAULT_SAMPLER)
    check_folder(args.output)
    finder = _Finder(args.lora_dir or _run_folders())
    tagged = [finder.take_tags(prompt) for prompt in prompts]  # names are checked before the model is loaded

    from lora_scripts.models.stable_diffusion import load_stable_diffusion

    dtype = _dtype(device)
    parts = load_stable_diffusion(source, device, dtype)
    size = _size(args.size, parts)
    if args.checkpoints:
        from lora_scripts.sampling.lora_files import checkpoint_files

        sheet = _checkpoint_sheet(args, tagged, checkpoint_files(args.checkpoints), weights, size)
    else:
        sheet = _prompt_sheet(args, tagged, size)
    jobs = list(dict.fromkeys(job for row in sheet.cells for job in row))
    if len(jobs) > _MOST_PICTURES:
        raise ConfigError(
            f"{len(jobs)} pictures are asked for. Use fewer prompts, checkpoints or weights (at most {_MOST_PICTURES})."
        )
    print(f"{len(jobs)} pictures of {size[0]}x{size[1]} with {source.title} on {device} ...", flush=True)
    pictures = _render(args, parts, jobs, device, sampler, source)
    if args.grid or args.checkpoints:
        path = _save_grid(args, sheet, pictures, source, sampler)
        print(f"{path}   all in one")
    return 0


def _refuse_options_without_effect(args: argparse.Namespace, task: str) -> None:
    """Raises ConfigError for options that were given and say nothing to this kind of model."""
    foreign = argparse.ArgumentParser()
    (_add_picture_arguments if task == "text-generation" else add_answer_arguments)(foreign)
    defaults = vars(foreign.parse_args([]))
    kind = "a language model" if task == "text-generation" else "a model that makes pictures"
    faults = [
        f"--{name.replace('_', '-')} has no effect: {args.base_model} is {kind}."
        for name, default in defaults.items()
        if getattr(args, name) != default
    ]
    if faults:
        raise ConfigError(faults)


# Options ------------------------------------------------------------------------------------------------------------------


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            text = args.prompts.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ConfigError(f"--prompts {args.prompts}: is not UTF-8 text. Save the file as UTF-8.") from None
        except OSError as error:
            raise ConfigError(f"--prompts {args.prompts}: cannot be read ({error.strerror}). Check the path.") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ConfigError('Nothing to render. Give --prompt "a fox <lora:NAME:0.7>" or --prompts FILE.')
    return prompts


def _checked(args: argparse.Namespace) -> list[float]:
    """The weights to compare; all faults of the numbers are reported together."""
    faults = []
    for name, lowest, highest in (
        ("count", 1, 1000),
        ("steps", 1, 200),
        ("batch_size", 1, 64),
        ("clip_skip", 1, 12),
        ("cfg", 1, 100),
    ):
        value = getattr(args, name)
        if not lowest <= value <= highest:
            faults.append(f"--{name.replace('_', '-')} {value}: must be between {lowest} and {highest}.")
    if not 0 <= args.seed < 2**63:
        faults.append(f"--seed {args.seed}: must be a whole number from 0 on.")
    weights: list[float] = []
    if args.weights is not None and not args.checkpoints:
        faults.append("--weights has no effect without --checkpoints. Name a run's output folder there.")
    for part in (args.weights or _DEFAULT_WEIGHTS).split(","):
        try:
            weights.append(float(part))
        except ValueError:
            faults.append(f"--weights {args.weights}: {part.strip()!r} is not a number. Write 0,0.5,0.7,1.")
    if args.size and not re.fullmatch(r"\d+([xX×]\d+)?", args.size.strip()):
        faults.append(f"--size {args.size}: write a width and a height, such as 512x768.")
    if faults:
        raise ConfigError(faults)
    return list(dict.fromkeys(weights))


def _size(text: str, parts: Any) -> tuple[int, int]:
    """Width and height; by default the square that the UNet was made for."""
    factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    if not text:
        side = parts.unet.config.sample_size
        width, height = reversed(side) if isinstance(side, Sequence) else (side, side)
        return int(width) * factor, int(height) * factor
    width, *rest = (int(number) for number in re.split("[xX×]", text.strip()))
    height = rest[0] if rest else width
    if not (factor <= width <= 4096 and factor <= height <= 4096):
        raise ConfigError(f"--size {text}: sides must be between {factor} and 4096 pixels.")
    if width % factor or height % factor:
        near = tuple(max(1, round(side / factor)) * factor for side in (width, height))
        raise ConfigError(
            f"--size {text}: both sides must be multiples of {factor}. The nearest is {near[0]}x{near[1]}."
        )
    return width, height


def _dtype(device: Any) -> Any:
    """Half precision on a GPU, as the WebUI renders; single precision elsewhere."""
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32


def _run_folders() -> list[Path]:
    return sorted(path for path in Path("output").glob("*") if path.is_dir())


# What is rendered ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tagged:
    """A prompt with its LoRA files found."""

    text: str
    shown: str
    loras: tuple[tuple[Path, float, float], ...]


class _Finder:
    """LoRA files by name, in the folders given."""

    def __init__(self, folders: Sequence[Path]) -> None:
        from lora_scripts.sampling.lora_files import find_loras

        missing = [folder for folder in folders if not folder.is_dir()]
        if missing:
            raise ConfigError(f"--lora-dir {missing[0]}: no such folder.")
        self._folders = folders
        self._known = find_loras(folders)

    def take_tags(self, prompt: str) -> _Tagged:
        from lora_scripts.sampling.lora_files import resolve_lora
        from lora_scripts.sampling.prompt import parse_prompt

        parsed = parse_prompt(prompt)
        loras = tuple(
            (resolve_lora(tag.name, self._known, self._folders), tag.unet_weight, tag.text_encoder_weight)
            for tag in parsed.loras
        )
        return _Tagged(parsed.text, prompt, loras)


def _request(args: argparse.Namespace, text: str, seed: int, size: tuple[int, int]) -> SampleRequest:
    from lora_scripts.families.protocol import SampleRequest

    return SampleRequest(text, args.negative, seed, args.steps, args.cfg, *size)


def _prompt_sheet(args: argparse.Namespace, prompts: Sequence[_Tagged], size: tuple[int, int]) -> _Sheet:
    """Prompts down, seeds across."""
    from lora_scripts.sampling.grid import Group

    seeds = range(args.seed, args.seed + args.count)
    cells = [[_Job(_request(args, p.text, seed, size), p.loras, p.shown) for seed in seeds] for p in prompts]
    columns = [f"seed {seed}" for seed in seeds] if args.count > 1 else [""]
    return _Sheet([prompt.shown for prompt in prompts], [Group("", columns)], cells)


def _checkpoint_sheet(
    args: argparse.Namespace,
    prompts: Sequence[_Tagged],
    files: Sequence[Path],
    weights: Sequence[float],
    size: tuple[int, int],
) -> _Sheet:
    """Prompts (and seeds) down, checkpoints with their weights across; weight 0 is rendered once for all of them."""
    from lora_scripts.sampling.grid import Group

    rows, cells = [], []
    for prompt in prompts:
        for seed in range(args.seed, args.seed + args.count):
            rows.append(prompt.shown + (f" (seed {seed})" if args.count > 1 else ""))
            row = []
            for file in files:
                for weight in weights:
                    own = ((file, weight, weight),) if weight else ()
                    tag = f" <lora:{file.stem}:{weight:g}>" if weight else ""
                    row.append(_Job(_request(args, prompt.text, seed, size), (*prompt.loras, *own), prompt.shown + tag))
            cells.append(row)
    columns = [f"{weight:g}" for weight in weights]
    return _Sheet(rows, [Group(file.stem, columns) for file in files], cells)


def _render(
    args: argparse.Namespace, parts: Any, jobs: Sequence[_Job], device: Any, sampler: str, source: BaseModel
) -> dict[_Job, Image]:
    """The pictures of all jobs, each saved as soon as its LoRAs' turn is over."""
    from lora_scripts.export.names import layer_shapes
    from lora_scripts.export.reader import AdapterChanges, read_changes
    from lora_scripts.sampling.denoise import render
    from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA

    components = parts.components
    shapes = layer_shapes(components)
    turns: dict[tuple[tuple[Path, float, float], ...], list[_Job]] = {}
    for job in jobs:
        turns.setdefault(job.loras, []).append(job)
    read: dict[Path, AdapterChanges] = {}
    pictures: dict[_Job, Image] = {}
    origin = Origin.of(source, sampler, args.clip_skip)
    lora_set = LoRASet(components)
    with _progress(len(jobs) * args.steps) as advance:
        for loras, turn in turns.items():
            wanted = {path for path, _, _ in loras}
            read = {
                path: file for path, file in read.items() if path in wanted
            }  # keep no more in memory than is at work
            for path in wanted - read.keys():
                read[path] = read_changes(path, shapes)
            at_work: list[WeightedLoRA] = [WeightedLoRA(read[path].weights, unet, te) for path, unet, te in loras]
            lora_set.apply(at_work)
            hashes = {path.stem: lora_hash(path, read[path].metadata) for path, _, _ in loras}
            for start in range(0, len(turn), args.batch_size):
                batch = turn[start : start + args.batch_size]
                images = render(
                    parts,
                    [job.request for job in batch],
                    device,
                    args.batch_size,
                    sampler=sampler,
                    clip_skip=args.clip_skip,
                    progress=_share_of(advance, len(batch) * args.steps),
                )
                for job, image in zip(batch, images, strict=True):
                    pictures[job] = image
                    path = save_picture(args.output, image, job.request, job.shown, origin, hashes)
                    print(f"{path}   {job.shown}", flush=True)
    lora_set.remove()
    return pictures


def _save_grid(
    args: argparse.Namespace, sheet: _Sheet, pictures: Mapping[_Job, Image], source: BaseModel, sampler: str
) -> Path:
    from lora_scripts.sampling.grid import draw_grid

    title = f"{source.title}, {sampler}, {args.steps} steps, CFG {args.cfg:g}, seed {args.seed}"
    cells = [[pictures[job] for job in row] for row in sheet.cells]
    # The labels may be cut or hold characters no font here can write: the file says them in full.
    columns = [f"{group.heading} {column}".strip() for group in sheet.groups for column in group.columns]
    text = "\n".join(
        [title, *(f"row {n}: {row}" for n, row in enumerate(sheet.rows, 1)), f"columns: {' | '.join(columns)}"]
    )
    return save_grid(args.output, draw_grid(sheet.rows, sheet.groups, cells, title), text)


def _share_of(advance: Callable[[float], None], amount: float) -> Callable[[int, int], None]:
    """Moves a bar by `amount` in equal parts while a rendering counts its own steps."""
    return lambda done, total: advance(amount / total)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float], None]]:
    """A progress bar over all denoising steps on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("rendering", total=total)
        yield lambda amount: bar.advance(task, amount)
