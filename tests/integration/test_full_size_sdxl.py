"""The real size: an SDXL single file with random weights, trained with both text encoders on a CPU. Takes minutes and 7 GB of disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import draw_pictures

ROOT = Path(__file__).parents[2]
MOST_BYTES = 20e9
RANK, ALPHA = 8, 4

MEASURED = """\
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("LORA_SCRIPTS_FULL_SIZE") != "1", reason="asked for by LORA_SCRIPTS_FULL_SIZE=1")
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read through the resource module")
def test_full_size_trains_in_20_gb_and_the_file_loads_in_diffusers(tmp_path: Path) -> None:
    from helpers.full_size import write_full_size

    model = tmp_path / "sd_xl_random.safetensors"
    write_full_size(model, "sdxl", torch.bfloat16)
    draw_pictures(tmp_path / "data", 2, size=512)
    (tmp_path / "measured.py").write_text(textwrap.dedent(MEASURED))
    settings = {
        "train_data_dir": tmp_path / "data",
        "base_model": model,
        "output_dir": tmp_path / "output" / "my_lora",
        "resolution": 512,
        "buckets": "false",
        "mixed_precision": "bf16",
        "device": "cpu",
        "batch_size": 1,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "train_text_encoder": "true",
        "max_steps": 1,
        "save_precision": "fp32",
        "clip_model": "none",
    }
    (tmp_path / "my.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty-hub")}
    command = [sys.executable, "measured.py", str(ROOT / "train.py"), "--config", "my.yaml"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "bfloat16" in done.stdout
    peak = int(done.stdout.rsplit("PEAK ", 1)[1])
    print(f"{peak / 1e9:.1f} GB at the peak, {seconds:.0f} s in all\n{done.stdout[-3000:]}")
    assert peak < MOST_BYTES, f"{peak / 1e9:.1f} GB"

    out = tmp_path / "output" / "my_lora"
    trained = load_file(out / "checkpoint-1" / "adapter.safetensors")
    changes = diffusers_changes(out / "my_lora.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in trained}
    assert set(changes) == layers
    # 70 transformer blocks with 2 attentions of 4 layers; 12 and 32 layers with 4 projections.
    assert Counter(layer.split(".")[0] for layer in layers) == {
        "unet": 560,
        "text_encoder": 48,
        "text_encoder_2": 128,
    }
    still = []
    for name, change in changes.items():
        ours = ALPHA / RANK * trained[f"{name}.lora_B"] @ trained[f"{name}.lora_A"]
        assert float((change - ours).norm()) <= 0.01 * float(ours.norm())  # diffusers keeps it in the model's bf16
        if not float(ours.norm()):
            still.append(name)
    # What is read of the first text encoder is its last layer but one.
    assert all(name.startswith("text_encoder.encoder.layers.11.") for name in still), still[:5]


def diffusers_changes(file: Path) -> dict[str, torch.Tensor]:
    """Every layer's weight change as diffusers understands the file; the model's own weights stay unset."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    from lora_scripts.models.clip_tokenizer import packaged_clip_tokenizer
    from lora_scripts.models.components import build_component
    from lora_scripts.models.published import published_config

    parts = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        module = build_component(part, published_config(part, "sdxl"), "full size")
        parts[part] = module.to(torch.bfloat16).to_empty(device="cpu")
    tokenizers = {"tokenizer": packaged_clip_tokenizer(), "tokenizer_2": packaged_clip_tokenizer()}
    pipeline = StableDiffusionXLPipeline(vae=None, scheduler=DDIMScheduler(), **parts, **tokenizers)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    changes = {}
    for part, root in parts.items():
        for name, module in root.named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                (adapter,) = module.lora_A
                up, down = module.lora_B[adapter].weight, module.lora_A[adapter].weight
                change = (module.scaling[adapter] * up.float() @ down.float()).detach()
                changes[f"{part}.{name.removeprefix('text_model.')}"] = change
    return changes
