"""`lora-scripts convert`: the same LoRA in the spelling of another program."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_scripts.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("file", type=Path, help="a .safetensors file, or a PEFT folder")
    parser.add_argument(
        "--to",
        required=True,
        choices=["kohya", "diffusers", "peft"],
        help="kohya: WebUI, Forge, ComfyUI, InvokeAI and diffusers; diffusers: its own; peft: folders for PEFT",
    )
    parser.add_argument("--output", type=Path, required=True, help="the new .safetensors file; for peft a folder")
    parser.add_argument(
        "--bake", action="store_true", help="turn any other kind (LoHa, LoKr, ...) into a plain LoRA first"
    )
    parser.add_argument("--base-model", help="the model it was trained on; with --bake, for a DoRA or OFT")
    parser.add_argument("--force", action="store_true", help="replace --output if it is there already")


def run(arguments: argparse.Namespace) -> int:
    """Converts and reads back; the exit code."""
    from lora_scripts.atomic_file import require_new_file
    from lora_scripts.atomic_folder import require_free
    from lora_scripts.errors import DataError

    if arguments.to == "peft":
        try:
            require_free(arguments.output)
        except DataError as error:
            raise ConfigError(f"--output {error}") from error
    else:
        require_new_file(arguments.output, [arguments.file], force=arguments.force)
    _convert(arguments.file, arguments)
    return 0


def _convert(source: Path, arguments: argparse.Namespace) -> None:
    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.adapter_files.conversion import convert_file
    from lora_scripts.adapter_files.readers import verdicts

    file = open_adapter_file(source)
    convert_file(file, arguments.to, arguments.output)
    written = open_adapter_file(arguments.output)
    written.require_sound()
    assert list(written.layers) == list(file.layers) or set(written.layers) == set(file.layers), "layers went astray"
    print(f"{arguments.file}: {len(file.layers)} layers for {file.title}, {file.spelling}")
    print(f"{arguments.output}: the same in the spelling of {arguments.to}")
    takers = [verdict.reader for verdict in verdicts(written) if verdict.ok]
    if takers:
        print(f"Read by {', '.join(takers)}. More: lora-scripts inspect {arguments.output}")
