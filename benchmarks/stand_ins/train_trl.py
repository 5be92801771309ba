"""The other side of `text_vs_peers.py`: TRL's SFTTrainer with PEFT, or unsloth's, stopped between steps.

    PYTHON benchmarks/stand_ins/train_trl.py JOB.json

The trainer's own defaults are used but for what JOB.json holds: `arguments` for SFTConfig, and what has to be equal on both
sides (model, rows in their order, rank, first LoRA, number format).
"""

# ruff: noqa: E402
from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gate import Gate

JOB = json.loads(Path(sys.argv[1]).read_text("utf-8"))
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

GATE = Gate()  # before the libraries have printed anything
if JOB["unsloth"]:
    import unsloth  # first, because it changes what the others are

import torch
from datasets import load_dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


def main() -> None:
    torch.set_num_threads(JOB["threads"])
    rows = load_dataset("json", data_files=JOB["rows"], split="train", cache_dir=JOB["cache"])
    arguments = SFTConfig(
        output_dir=JOB["output"],
        max_steps=JOB["steps"],
        per_device_train_batch_size=JOB["batch_size"],
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=JOB["device"] == "cpu",
        **JOB["arguments"],
    )
    trainer = (unsloth_trainer if JOB["unsloth"] else trl_trainer)(arguments, rows)
    set_peft_model_state_dict(trainer.model, load_file(Path(JOB["first_lora"]) / "adapter_model.safetensors"))
    tokens, labels = hashlib.sha256(), hashlib.sha256()
    for row in trainer.train_dataset:
        trained = row.get("completion_mask") or [int(label != -100) for label in row["labels"]]
        tokens.update(json.dumps(list(row["input_ids"])).encode())
        labels.update(json.dumps([int(each) for each in trained]).encode())
    names = ["torch", "transformers", "trl", "peft", *(["unsloth", "unsloth_zoo"] if JOB["unsloth"] else [])]
    weight = next(p for name, p in trainer.model.named_parameters() if "q_proj" in name and "lora" not in name)
    GATE.tell(
        versions={name: version(name) for name in names},
        tokens=tokens.hexdigest(),
        trained=labels.hexdigest(),
        dtype=str(weight.dtype),
        checkpointing=bool(trainer.args.gradient_checkpointing),
        autocast=bool(trainer.args.bf16),
    )
    trainer.add_callback(Gatekeeper())
    trainer.train()


def trl_trainer(arguments: SFTConfig, rows: Any) -> SFTTrainer:
    adapter = LoraConfig(r=JOB["rank"], lora_alpha=JOB["rank"], target_modules=LAYERS, task_type="CAUSAL_LM")
    return SFTTrainer(JOB["model"], args=arguments, train_dataset=rows, peft_config=adapter)


def unsloth_trainer(arguments: SFTConfig, rows: Any) -> SFTTrainer:
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        JOB["model"], max_seq_length=2048, dtype=getattr(torch, JOB["dtype"]), load_in_4bit=False
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=JOB["rank"],
        lora_alpha=JOB["rank"],
        target_modules=LAYERS,
        use_gradient_checkpointing=JOB["unsloth_checkpointing"],
        random_state=JOB["arguments"]["seed"],
    )
    return SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)


class Gatekeeper(TrainerCallback):
    """Waits before the first step and after every one."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        GATE.pause()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        GATE.pause()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "loss" in logs:
            GATE.tell(losses=[float(logs["loss"])])


if __name__ == "__main__":
    main()
