"""Talk with a language model and its LoRAs: `python tools/chat.py --base-model DIR --lora DIR`. The same as `lora-scripts chat`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent / "src")  # in place of this folder, which holds an inspect.py

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["chat", *sys.argv[1:]]))
