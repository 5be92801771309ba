"""Bytes of quantised weights from shapes, against what bitsandbytes then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_scripts.models.quantised import load_quantised, stored_bytes
from lora_scripts.planning.quantised_bytes import quantised_saving

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_predicted_saving_is_what_the_loaded_model_takes_less(kind: Literal["int8", "nf4"], tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    held = load_quantised(tmp_path, "tiny", torch.bfloat16, torch.device("cpu"), kind)
    largest = 256 * 768 * 2  # put back while it computes
    saved = stored_bytes(model) - stored_bytes(held) - largest
    assert quantised_saving([model], kind) == pytest.approx(saved, rel=0.02)
    assert quantised_saving([model], "none") == 0
