"""Turn any adapter into a plain LoRA: `python tools/bake.py ADAPTER --output LORA`. As `lora-scripts bake`."""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parent.parent / "src"
)  # in place of this folder, whose inspect.py would hide Python's

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["bake", *sys.argv[1:]]))
