"""Write captions: `python tools/auto_label.py --input DIR --output DIR/metadata.csv`. The same as `lora-scripts label`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent / "src")  # in place of this folder, which holds an inspect.py

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["label", *sys.argv[1:]]))
