"""Say what a LoRA file is and who reads it: `python tools/inspect.py FILE`. As `lora-scripts inspect`."""

import sys
from pathlib import Path

# This folder comes first when the file is run; the standard library has an `inspect` of its own, which torch needs.
sys.path[0] = str(Path(__file__).resolve().parent.parent / "src")

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["inspect", *sys.argv[1:]]))
