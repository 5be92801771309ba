"""Trains mini-llama from scratch on the dialogues of the shop.

    python tools/make_builtin/make_llama_tokenizer.py && python tools/make_builtin/train_llama.py

Every dialogue is a row by itself, and rows of like length form a batch: nothing is read across two dialogues, and
little of a batch is padding. Answers and plain texts count fully, the user's words a little: a model that can ask the
questions has learnt the words, and most of what users type cannot be foreseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import (
    AveragedWeights,
    Clock,
    Curve,
    arguments,
    learning_rate,
    pick_device,
    replace_folder,
    save_state,
    share_gradients,
)
from llama_answers import answer_all
from make_llama_tokenizer import MAX_TOKENS, write_tokenizer
from muon import Muon
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_scripts.builtin.dialogue_world import Talk, held_out_dialogues, is_right, pretraining

USER_WEIGHT = 0.2
"""How much a token of the user or the system counts, where one of an answer counts 1."""

POOL = 1024
"""Dialogues that are drawn at once and sorted into batches by length."""

Row = tuple[list[int], list[float]]


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of four layers with grouped-query attention, for our vocabulary."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(entry: Talk | str, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Token ids, and how much each counts; the chat template's text, message by message."""
    if isinstance(entry, str):
        ids = [*tokenizer.encode(entry, add_special_tokens=False), tokenizer.pad_token_id]
        return ids, [1.0] * len(ids)
    ids, weights = [], []
    for message in entry.messages:
        head = tokenizer.encode(f"<|start|>{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(message["content"] + "<|end|>", add_special_tokens=False)
        line = tokenizer.encode("\n", add_special_tokens=False)
        weight = 1.0 if message["role"] == "assistant" else USER_WEIGHT
        ids += head + body + line
        weights += [0.0] * len(head) + [weight] * len(body) + [0.0] * len(line)
    return ids, weights


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """[B,L] token ids and weights of about `tokens` tokens each, without end."""
    entries = pretraining(seed)
    order = torch.Generator().manual_seed(seed)
    while True:
        rows = sorted((encode(e, tokenizer) for e in islice(entries, POOL)), key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        for k in torch.randperm(len(groups), generator=order).tolist():
            length = max(len(ids) for ids, _ in groups[k])
            ids = torch.full((len(groups[k]), length), tokenizer.pad_token_id)
            weights = torch.zeros(len(groups[k]), length)
            for i, (row, row_weights) in enumerate(groups[k]):
                ids[i, : len(row)] = torch.tensor(row)
                weights[i, : len(row)] = torch.tensor(row_weights)
            yield ids, weights


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of each next token, averaged with the weights."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids[:, :-1]).logits
    each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (each * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, talks: list[Talk]) -> float:
    """Share of right greedy answers."""
    answers = answer_all(model, tokenizer, [t.question for t in talks])
    return sum(is_right(t.asked, a.text) for t, a in zip(talks, answers, strict=True)) / len(talks)


def write_model(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model in fp16 and its tokenizer, as AutoModelForCausalLM and AutoTokenizer load them."""

    def write(target: Path) -> None:
        model.half().save_pretrained(target)
        write_tokenizer(tokenizer, target)

    replace_folder(folder, write)


def main() -> None:
    """Trains, and writes mini-llama/ and curves/llama.csv under the work folder."""
    given = arguments(
        __doc__.split("\n")[0],
        minutes=40,
        batch_tokens=2048,
        peak_lr=3e-3,
        check_every=150,
        start_from="",
        name="llama",
    )
    device = pick_device()
    tokenizer = AutoTokenizer.from_pretrained(given.work / "tokenizer-llama")
    model = LlamaForCausalLM(llama_config(tokenizer)).to(device)
    if given.start_from:
        model = LlamaForCausalLM.from_pretrained(given.start_from, dtype=torch.float32).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = Muon(model.named_parameters(), lr=given.peak_lr, weight_decay=0.01, adam_names=("embed", "lm_head"))
    average = AveragedWeights(model, decay=0.995)
    state_path = given.work / "state" / f"{given.name}.pt"
    step, elapsed_s, running = 0, 0.0, 0.0
    if given.resume and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.step = state["average"], state["step"]
        step, elapsed_s = state["step"], state["elapsed_s"]
    curve, clock = Curve(given.work / "curves", given.name, given.resume), Clock(given.minutes, elapsed_s)
    checks = held_out_dialogues(seed=1, count=128)
    progress = clock.progress
    seed = given.seed + 1000 * step + 1_000_000 * given.rank
    for ids, weights in batches(tokenizer, seed, given.batch_tokens // given.team):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given.peak_lr, progress, step)
        loss = weighted_loss(model, ids.to(device), weights.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        progress = share_gradients(model.parameters(), clock.progress)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        step, running = step + 1, running + float(loss.detach())
        if given.rank == 0 and (step % given.check_every == 0 or progress >= 1):
            twin = average.applied_to(model)
            right = share_right(twin, tokenizer, checks)
            done = running / ((step - 1) % given.check_every + 1)
            curve.add(step=step, minutes=clock.elapsed_s / 60, loss=done, right=right)
            running = 0.0
            save_state(
                state_path,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.values,
                    "step": step,
                    "elapsed_s": clock.elapsed_s,
                },
            )
            write_model(given.work / "mini-llama", twin, tokenizer)
        if progress >= 1:
            break
    curve.draw("minutes", ["loss", "right"])


if __name__ == "__main__":
    main()
