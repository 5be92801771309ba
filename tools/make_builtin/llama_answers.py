"""Greedy answers of a language model to many conversations at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_scripts.builtin.dialogue_world import Message

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Answer:
    """What the model said, and whether it ended its turn by itself."""

    text: str
    ended: bool


@torch.no_grad()
def answer_all(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[Answer]:
    """One greedy answer per conversation, in their order; shorter ones are padded on the left."""
    out: list[Answer] = []
    for start in range(0, len(conversations), batch_size):
        some = conversations[start : start + batch_size]
        prompts = [tokenizer.apply_chat_template(list(c), tokenize=False, add_generation_prompt=True) for c in some]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        ids = model.generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in row
            kept = row[: row.index(tokenizer.eos_token_id)] if ended else row
            out.append(Answer(tokenizer.decode(kept, skip_special_tokens=True).strip(), ended))
    return out
