"""Runs one of diffusers' text-to-image examples as it is, also where torchvision is not installed.

    python benchmarks/stand_ins/run_example.py train_text_to_image_lora.py --pretrained_model_name_or_path ...

Where torchvision is installed this only passes the call on. Elsewhere `from torchvision import transforms` in the example
finds `torchvision_transforms.py` of this folder. It is put in place after the libraries have looked for torchvision, so
that none of them takes the stand-in for the real one.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def put_stand_in_in_place() -> None:
    """`torchvision.transforms` becomes importable."""
    import diffusers  # noqa: F401
    from transformers.utils import is_torchvision_available

    # The libraries remember their answer, so it has to be asked for now.
    if is_torchvision_available():
        raise RuntimeError("transformers found a torchvision where there is none")
    if importlib.util.find_spec("datasets") is not None:
        import datasets.config

        assert not datasets.config.TORCHVISION_AVAILABLE

    import torchvision_transforms as transforms

    package = ModuleType("torchvision")
    package.__spec__ = ModuleSpec("torchvision", None)
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules["torchvision"] = package
    sys.modules["torchvision.transforms"] = transforms
    functional = ModuleType("torchvision.transforms.functional")
    functional.crop = transforms.crop  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"] = functional


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: {Path(__file__).name} EXAMPLE.py [its options]")
    run_script(Path(sys.argv[1]), sys.argv[2:])


def run_script(script: Path, arguments: Sequence[str], *, stand_in: bool = True) -> None:
    """Runs it as `python SCRIPT ARGUMENTS` would; with `stand_in`, torchvision is served where it is missing."""
    if stand_in and importlib.util.find_spec("torchvision") is None:
        put_stand_in_in_place()
    sys.argv = [str(script.resolve()), *arguments]
    sys.path.insert(0, str(script.resolve().parent))  # as the interpreter does
    runpy.run_path(str(script.resolve()), run_name="__main__")


if __name__ == "__main__":
    main()
