"""The same LoRA in another spelling: `python tools/convert.py FILE --to kohya --output NEW.safetensors`. As `lora-scripts convert`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent / "src")  # in place of this folder, which holds an inspect.py

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
