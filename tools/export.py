"""A LoRA for another program: `python tools/export.py --for vllm --base-model M --lora L --output DIR`. As `lora-scripts export`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent / "src")  # in place of this folder, which holds an inspect.py

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
