"""The real size: a Stable Diffusion 1.5 single file with random weights, trained from the nine-key settings file on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import draw_pictures

ROOT = Path(__file__).parents[2]
MOST_BYTES = 12e9

NINE_KEYS = """\
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/Stable-diffusion/v1-5-pruned.safetensors"
lora_rank: 8
batch_size: 4
epochs: 10
learning_rate: 2e-4
output_dir: "./output/my_style_lora"
save_steps: 100
"""

MEASURED = """\
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read through the resource module")
def test_full_size_trains_in_12_gb_and_the_file_loads_in_diffusers(tmp_path: Path) -> None:
    from helpers.full_size import write_full_size

    model = tmp_path / "models" / "Stable-diffusion" / "v1-5-pruned.safetensors"
    model.parent.mkdir(parents=True)
    write_full_size(model, "sd15")
    draw_pictures(tmp_path / "data" / "style_train", 4, size=256)
    (tmp_path / "my.yaml").write_text(NINE_KEYS)
    (tmp_path / "measured.py").write_text(textwrap.dedent(MEASURED))
    settings = ["max_steps=2", "resolution=256", "mixed_precision=bf16", "device=cpu", "buckets=false"]
    command = [sys.executable, "measured.py", str(ROOT / "train.py"), "--config", "my.yaml"]
    for setting in settings:
        command += ["--set", setting]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty-hub")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "bfloat16" in done.stdout
    peak = int(done.stdout.rsplit("PEAK ", 1)[1])
    assert peak < MOST_BYTES, f"{peak / 1e9:.1f} GB"

    out = tmp_path / "output" / "my_style_lora"
    trained = load_file(out / "checkpoint-2" / "adapter.safetensors")
    changes = diffusers_changes(out / "my_style_lora.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in trained}
    assert {f"unet.{name}" for name in changes} == layers
    assert len(layers) == 128
    for name, change in changes.items():
        ours = trained[f"unet.{name}.lora_B"] @ trained[f"unet.{name}.lora_A"]  # alpha is the rank here: scale 1
        # diffusers keeps a LoRA in the model's bf16, which has 8 bits.
        assert float((change - ours).norm()) < 0.01 * float(ours.norm())
        assert float(ours.norm()) > 0


def diffusers_changes(file: Path) -> dict[str, torch.Tensor]:
    """Every U-Net layer's weight change as diffusers understands the file; the model's own weights stay unset."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lora_scripts.models.clip_tokenizer import packaged_clip_tokenizer
    from lora_scripts.models.published import published_config

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(published_config("unet")).to(torch.bfloat16)
        text_encoder = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1))
    unet.to_empty(device="cpu")
    text_encoder.to_empty(device="cpu")
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=packaged_clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    changes = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            (adapter,) = module.lora_A
            up, down = module.lora_B[adapter].weight, module.lora_A[adapter].weight
            changes[name] = (module.scaling[adapter] * up.float() @ down.float()).detach()
    return changes
