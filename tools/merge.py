"""Merge LoRAs into a model or into one LoRA: `python tools/merge.py --lora A --lora B --output C`. As `lora-scripts merge`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent / "src")  # in place of this folder, which holds an inspect.py

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["merge", *sys.argv[1:]]))
