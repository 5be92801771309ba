"""Learns the byte-level BPE of mini-llama from its pre-training dialogues, and writes it with its chat template.

Text is split as Qwen2's tokenizer splits it (every digit by itself), so that programs which know that rule, such as
llama.cpp with its pre-tokenizer "qwen2", read our text the same way.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from scenes import DEFAULT_WORK
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_scripts.builtin.dialogue_world import pretraining

SIZE = 1536
MAX_TOKENS = 512
PAD, START, END = "<|endoftext|>", "<|start|>", "<|end|>"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start|>assistant\\n' }}"
    "{%- endif %}"
)


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """What the merges are learnt from."""
    for entry in islice(pretraining(seed), count):
        if isinstance(entry, str):
            yield entry
        else:
            yield from (f"{message['role']}\n{message['content']}" for message in entry.messages)


def learn(count: int = 40_000) -> PreTrainedTokenizerFast:
    """The tokenizer; every byte has an entry, so any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(count), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token_type_ids
        clean_up_tokenization_spaces=False,
    )


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The tokenizer's files, with the names that transformers 4 knows as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for leftover in ("is_local", "local_files_only", "backend"):
        config.pop(leftover, None)
    config.pop("extra_special_tokens", None)
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": [START],
        "model_input_names": ["input_ids", "attention_mask"],  # Llama takes no token_type_ids
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Writes tokenizer-llama/ under the work folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    given = parser.parse_args()
    tokenizer = learn()
    write_tokenizer(tokenizer, given.work / "tokenizer-llama")
    print(f"{len(tokenizer)} entries in {given.work / 'tokenizer-llama'}")


if __name__ == "__main__":
    main()
