"""Train a LoRA: `python train.py --config configs/my_lora_config.yaml`. The same as `lora-scripts train`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

if __name__ == "__main__":
    from lora_scripts.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
