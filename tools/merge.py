"""Merge LoRAs into a model: `python tools/merge.py --base-model M --lora L --output DIR`. As `lora-scripts merge`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent / "src")  # in place of this folder, which holds an inspect.py

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["merge", *sys.argv[1:]]))
