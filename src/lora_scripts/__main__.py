"""`python -m lora_scripts` is the same as the `lora-scripts` command."""

import sys

from lora_scripts.cli import main

if __name__ == "__main__":
    sys.exit(main())
