"""`lora-scripts convert`: the same LoRA in the spelling of another program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile
    from lora_scripts.adapter_files.conversion import Target
    from lora_scripts.lora_tools.baked_file import Baked
    from lora_scripts.lora_tools.ranks import RankChoice

__all__ = ["add_arguments", "run"]

_SPELLINGS = {"kohya": "kohya", "diffusers": "diffusers", "peft": "PEFT", "native": "the original model's"}
_OF_BAKING = ("base_model", "rank", "keep", "max_rank")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    from lora_scripts.lora_tools.ranks import add_rank_arguments

    parser.add_argument("file", type=Path, help="a .safetensors file, or a PEFT folder")
    parser.add_argument(
        "--to",
        required=True,
        choices=["kohya", "diffusers", "peft"],
        help="kohya: WebUI, Forge, ComfyUI, InvokeAI and diffusers; diffusers: its own; peft: folders for PEFT",
    )
    parser.add_argument("--output", type=Path, required=True, help="the new .safetensors file; for peft a folder")
    parser.add_argument(
        "--bake", action="store_true", help="turn any other kind (LoHa, LoKr, DoRA, ...) into a plain LoRA on the way"
    )
    baking = parser.add_argument_group("with --bake, as of lora-scripts bake")
    baking.add_argument("--base-model", help="the model it was trained on; a DoRA or OFT needs it")
    add_rank_arguments(baking)
    parser.add_argument("--force", action="store_true", help="replace --output if it is there already")


def run(arguments: argparse.Namespace) -> int:
    """Converts and reads back; the exit code."""
    from lora_scripts.atomic_file import require_new_file
    from lora_scripts.atomic_folder import require_free
    from lora_scripts.errors import DataError

    choice = _rank_choice(arguments)
    if arguments.to == "peft":
        if arguments.force:
            raise ConfigError(
                "--force: has an effect on files alone; a folder that is there already is never replaced."
            )
        try:
            require_free(arguments.output)
        except DataError as error:
            raise ConfigError(f"--output {error}") from error
    else:
        require_new_file(arguments.output, [arguments.file], force=arguments.force)

    from lora_scripts.adapter_files.adapter_file import open_adapter_file

    file = open_adapter_file(arguments.file)
    number = f"{len(file.layers)} layer{'' if len(file.layers) == 1 else 's'}"
    print(f"{file.path}: {_kinds(file)}, {number} for {file.title}, {_SPELLINGS[file.spelling]} names")
    if choice is None or file.is_plain:
        written = _convert(file, arguments.to, arguments.output)
        note = "; it was a plain LoRA already" if arguments.bake else ""
        print(f"{arguments.output}: the same in the spelling of {_SPELLINGS[arguments.to]}{note}")
    else:
        baked, written = _bake_and_convert(arguments, choice)
        print(
            f"{arguments.output}: a plain LoRA of rank {baked.losses.ranks} in the spelling of {_SPELLINGS[arguments.to]}"
        )
        print(f"What the baking did: {baked.losses}")
    _say_who_reads_it(written, arguments.output)
    print(f"Look at it: lora-scripts inspect {arguments.output}")
    return 0


def _rank_choice(arguments: argparse.Namespace) -> RankChoice | None:
    """How ranks are chosen where an adapter is baked; None without `--bake`."""
    from lora_scripts.lora_tools.baked_file import BY_DEFAULT
    from lora_scripts.lora_tools.ranks import rank_choice

    given = [name for name in _OF_BAKING if getattr(arguments, name) is not None]
    if not arguments.bake:
        if given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(f"{names}: has an effect with --bake alone; otherwise tensors are copied as they are.")
        return None
    if given in ([], ["base_model"]):
        return BY_DEFAULT
    return rank_choice(arguments.rank, arguments.keep, arguments.max_rank)


def _kinds(file: AdapterFile) -> str:
    from lora_scripts.adapter_files.endings import KINDS

    return ", ".join(KINDS[kind] for kind in file.kinds)


def _convert(file: AdapterFile, target: Target, output: Path) -> AdapterFile:
    """Writes the file and opens it again."""
    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.adapter_files.conversion import convert_file

    convert_file(file, target, output)
    written = open_adapter_file(output)
    written.require_sound()
    assert set(written.layers) == set(file.layers), "layers went astray"
    return written


def _bake_and_convert(arguments: argparse.Namespace, choice: RankChoice) -> tuple[Baked, AdapterFile]:
    """By way of a kohya file, which every plain LoRA fits into; for the other spellings it is taken away again."""
    import tempfile

    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.lora_tools.baked_file import write_baked

    output: Path = arguments.output
    if arguments.to == "kohya":
        baked = write_baked(arguments.file, output, choice, arguments.base_model)
        return baked, open_adapter_file(output)
    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder) / f"{output.stem}.safetensors"
        baked = write_baked(arguments.file, between, choice, arguments.base_model)
        return baked, _convert(open_adapter_file(between), arguments.to, output)


def _say_who_reads_it(written: AdapterFile, output: Path) -> None:
    from lora_scripts.adapter_files.readers import verdicts

    takers = [verdict.reader for verdict in verdicts(written) if verdict.ok]
    if takers:
        print(f"Read by {', '.join(takers)}.")
    elif written.spelling == "peft":
        for component in written.components:
            folder = str(output / component)
            print(f"Read by PEFT: PeftModel.from_pretrained(pipeline.{component}, {folder!r})")
