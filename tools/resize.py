"""Make a LoRA file smaller: `python tools/resize.py LORA --rank 16 --output SMALL`. As `lora-scripts resize`."""

import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parent.parent / "src"
)  # in place of this folder, whose inspect.py would hide Python's

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["resize", *sys.argv[1:]]))
