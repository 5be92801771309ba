"""Writes `src/lora_scripts/adapter_files/tables/*.tsv.gz`: every layer of Stable Diffusion 1.5, 2 and SDXL that can get an adapter.

    python tools/make_layer_tables.py

Each line: the layer with its component in front, the shape of its weight, its name in a kohya file (empty where none has a
place for it), its path in the original U-Net. The models are built from the published configurations on the meta device, which takes no memory for weights.
"""

import gzip
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src"
sys.path[0] = str(SOURCE)  # in place of this folder, which holds an inspect.py

if __name__ == "__main__":
    from lora_scripts.adapter_files.built_layers import built_layers
    from lora_scripts.adapter_files.reference import ARCHITECTURES

    folder = SOURCE / "lora_scripts" / "adapter_files" / "tables"
    folder.mkdir(exist_ok=True)
    for architecture in ARCHITECTURES:
        rows = built_layers(architecture)
        text = "".join(f"{row.layer}\t{'x'.join(map(str, row.shape))}\t{row.kohya}\t{row.original}\n" for row in rows)
        path = folder / f"{architecture}.tsv.gz"
        path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
        print(f"{path.name}: {len(rows)} layers, {path.stat().st_size:,} bytes")
