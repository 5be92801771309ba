"""What both sides of a comparison on dialogues train: a random Llama, a tokenizer made on the spot, dialogues, a first LoRA.

Everything follows from the seed. The weights know nothing, so what is compared is how they are trained, not what comes out.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ("<s>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>")
FEWEST_TOKENS, MOST_TOKENS = 60, 400
ANSWER_SHARE = (0.4, 0.6)
COPIED = 0.5
"""Share of an answer's words that stand in the question too, so that there is something to learn."""


@dataclass(frozen=True)
class Size:
    """A Llama by its measures."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = True


SIZES = {
    "tiny": Size(128, 352, 4, 4, 2, 4000),
    "mid": Size(768, 2048, 12, 12, 4, 32000),
}


LARGE = {"8b": Size(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False)}
"""A Llama of eight billion weights, in bfloat16: 16 GB on the disk."""


def make_base_and_dialogues(folder: Path, size: str, *, rows: int, seed: int) -> None:
    """Fills a folder with `model/` and `data/train.jsonl`, unless they are there."""
    if (folder / "facts.json").is_file():
        return
    _write_base(folder, size, rows, seed)
    (folder / "facts.json").write_text(json.dumps({"size": size, "rows": rows, "seed": seed}) + "\n", "utf-8")


def make_materials(folder: Path, size: str, *, rows: int, rank: int, seed: int) -> None:
    """Fills a folder with `model/`, `data/train.jsonl` and `first_lora/`, unless they are there with the same facts."""
    facts = {"size": asdict(SIZES[size]), "rows": rows, "rank": rank, "seed": seed}
    kept = folder / "facts.json"
    if kept.is_file() and json.loads(kept.read_text("utf-8")) == facts:
        return
    model = _write_base(folder, size, rows, seed)
    _save_first_lora(model, folder / "first_lora", rank, seed)
    kept.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def _write_base(folder: Path, size: str, rows: int, seed: int) -> Any:
    """The model, which is written with its tokenizer and the dialogues."""
    import torch

    measures = {**SIZES, **LARGE}[size]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    words = _words(measures.vocab_size - len(MARKS), seed)
    (folder / "data" / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in _dialogues(words, rows, seed)), "utf-8"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if size in LARGE else before)
    try:
        model = _model(measures, seed)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder / "model")
    _tokenizer(words).save_pretrained(folder / "model")
    return model


def _words(count: int, seed: int) -> list[str]:
    """Different made-up words, the frequent ones first."""
    rng = random.Random(f"words {seed}")
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = rng.randint(1, 4)
        words["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))] = None
    return list(words)


def _dialogues(words: list[str], rows: int, seed: int) -> list[dict[str, str]]:
    """Questions and answers of 60 to 400 tokens together, words as frequent as in real text (Zipf)."""
    rng = random.Random(f"dialogues {seed}")
    weights = [1 / (rank + 3) for rank in range(len(words))]
    dialogues = []
    for _ in range(rows):
        length = rng.randint(FEWEST_TOKENS, MOST_TOKENS) - 4  # the marks
        answer_length = round(length * rng.uniform(*ANSWER_SHARE))
        question = rng.choices(words, weights, k=length - answer_length)
        fresh = rng.choices(words, weights, k=answer_length)
        answer = [rng.choice(question) if rng.random() < COPIED else word for word in fresh]
        dialogues.append({"input": " ".join(question), "output": " ".join(answer)})
    return dialogues


def _model(size: Size, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    spread = size.hidden_size**-0.5  # so that the frozen head can tell tokens apart, and the loss can fall
    return LlamaForCausalLM(LlamaConfig(**asdict(size), **ids, max_position_embeddings=2048, initializer_range=spread))


def _tokenizer(words: list[str]) -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*MARKS, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=MARKS[4]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(MARKS))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=MARKS[0],
        eos_token=MARKS[1],
        pad_token=MARKS[1],
        unk_token=MARKS[4],
        chat_template=TEMPLATE,
    )


def _save_first_lora(model: Any, folder: Path, rank: int, seed: int) -> None:
    """The LoRA that training starts from on both sides, as PEFT draws and writes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed + 1)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
