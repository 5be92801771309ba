"""Rules between the settings of a run; those of the adapter, the data, the loss and of speed are in files of their own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_scripts.adapter_rules import adapter_faults
from lora_scripts.data_rules import data_faults
from lora_scripts.loss_rules import loss_faults
from lora_scripts.speed_rules import speed_faults

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig

__all__ = ["FOR_OTHER_TASKS", "run_faults"]

MAX_NAME_BYTES = 240
"""File systems allow 255; a few more are needed while a file is written."""
RESERVED_NAMES = frozenset(
    {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
)
PICTURES_ONLY = frozenset(
    {
        "folders", "masked_loss", "mask_dir", "masked_weight_outside", "masked_normalize", "metadata_path", "resolution", "buckets", "bucket_step", "max_aspect", "upscale", "flip", "trigger_word",
        "caption_per_line", "caption_separator", "caption_shuffle", "caption_keep", "caption_dropout", "caption_variants", "prediction",
        "zero_terminal_snr", "clip_skip", "vae_precision", "train_text_encoder", "text_encoder_learning_rate", "min_snr_gamma",
        "noise_offset", "timestep_sampling", "min_timestep", "max_timestep", "validation_pictures", "clip_model",
        "metadata_level", "cuda_graphs", "record_passes", "debiased_estimation", "loss_type", "huber_c", "huber_schedule", "pyramid_noise_iterations",
        "pyramid_noise_discount", "input_perturbation", "prior_preservation_weight", "prior_prompt", "conv_rank", "conv_alpha", "preset", "export_as", "sample_negative_prompt", "sample_steps", "sample_guidance",
    }
)  # fmt: skip
DIALOGUES_ONLY = frozenset(
    {
        "max_length",
        "train_on",
        "system_prompt",
        "packing",
        "validation_dialogues",
        "sample_tokens",
        "quantization",
        "shard_model",
        "objective",
        "preference_beta",
    }
)
FOR_OTHER_TASKS = {"text-to-image": DIALOGUES_ONLY, "text-generation": PICTURES_ONLY}
"""Task -> settings that can have no effect in it."""


def run_faults(config: RunConfig) -> list[str]:
    """What is wrong with the settings together, one line each; a setting that was written and has no effect is a fault too."""
    written = config.model_fields_set
    faults: list[str] = []

    def inert(setting: str, reason: str) -> None:
        if setting in written:
            faults.append(f"{setting}: has no effect because {reason}. Remove it or change the other setting.")

    for setting in sorted(written & FOR_OTHER_TASKS[config.task_type]):
        inert(setting, f"task_type is {config.task_type}")
    if config.objective == "sft":
        inert("preference_beta", "objective is sft")
    else:
        inert("train_on", f"objective is {config.objective}, which compares answers")
    if not config.train_text_encoder and config.text_encoder_learning_rate is not None:
        inert("text_encoder_learning_rate", "train_text_encoder is false")
    if not config.caption_shuffle:
        inert("caption_keep", "caption_shuffle is false")
        inert("caption_variants", "caption_shuffle is false")
        inert("caption_separator", "caption_shuffle is false")
    elif config.train_text_encoder:
        inert("caption_variants", "train_text_encoder is true and captions are shuffled without a cache")
    if config.lr_scheduler != "cosine_with_restarts":
        inert("lr_cycles", f"lr_scheduler is {config.lr_scheduler}")
    if config.lr_scheduler == "constant" and config.warmup_steps not in ("auto", 0):
        inert("warmup_steps", "lr_scheduler is constant; constant_with_warmup has a warm-up")
    if config.ema_decay and config.optimizer == "adamw_schedulefree":
        faults.append("ema_decay: adamw_schedulefree averages the weights by itself. Remove one of them.")
    if not config.buckets:
        inert("bucket_step", "buckets is false")
        inert("max_aspect", "buckets is false")
    faults += data_faults(config, inert)
    faults += adapter_faults(config, inert)
    faults += loss_faults(config, inert)
    if config.lora_init == "pissa" and config.init_lora_weights is not None:
        faults.append("lora_init: pissa: the matrices begin as in init_lora_weights. Remove one of them.")
    if config.lora_init == "pissa" and config.quantization != "none":
        faults.append(
            f"lora_init: pissa: not with quantization: {config.quantization}. What it promises there needs the rest of each "
            "weight to be quantised in place of the weight, which is not done here. Remove one of them."
        )
    faults += speed_faults(config)
    if config.sample_every == 0:
        for setting in (
            "sample_prompts",
            "sample_negative_prompt",
            "sample_steps",
            "sample_guidance",
            "sample_seed",
        ):
            inert(setting, "sample_every is 0")
    if config.keep == "last":
        inert("clip_model", "keep is last")
    if config.num_held_out == 0:
        inert("validate_every", f"validation_{config.words.examples} is 0")
    if config.num_held_out == 0 or config.validate_every == 0:
        inert("early_stopping", "the validation loss is off")
    if config.batch_size != "auto":
        inert("effective_batch", "batch_size is a number, times gradient_accumulation_steps, not auto")
        if "auto" not in (config.gradient_checkpointing, config.block_swap):
            inert("memory_limit_gb", "neither batch_size nor gradient_checkpointing nor block_swap is auto")
    elif config.effective_batch is not None:
        inert("gradient_accumulation_steps", "effective_batch says how many pictures a step has")
    if (
        isinstance(config.warmup_steps, int)
        and config.max_steps is not None
        and config.warmup_steps >= config.max_steps
    ):
        faults.append(f"warmup_steps: {config.warmup_steps} is not below max_steps ({config.max_steps}).")
    if config.output_name is not None and not re.fullmatch(r"[^\\/:*?\"<>|\x00-\x1f]+", config.output_name):
        faults.append(f"output_name: {config.output_name!r} holds characters that a file name cannot have.")
    if len(f"{config.name}-9999999.safetensors".encode()) > MAX_NAME_BYTES:
        faults.append(
            f"output_name: {config.name[:20]!r}... is too long for a file name; 70 Chinese or 200 Latin characters fit."
        )
    if config.name.split(".")[0].upper() in RESERVED_NAMES:
        faults.append(f"output_name: {config.name!r} is a name that Windows keeps for devices. Choose another one.")
    return faults
