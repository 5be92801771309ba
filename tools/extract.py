"""Take a LoRA from two checkpoints: `python tools/extract.py --tuned T --base-model B --rank 32 --output LORA`. As `lora-scripts extract`."""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parent.parent / "src"
)  # in place of this folder, whose inspect.py would hide Python's

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["extract", *sys.argv[1:]]))
