"""Started by torch's launcher: a model in shards makes a pass, and what tensors take in this process is written down.

Arguments: kind of model, folder for the results.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch


def tensor_bytes() -> int:
    """Of all tensors that are alive, each piece of memory once."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            held[storage._cdata] = storage.nbytes()
    return sum(held.values())


def main(kind: str, out: Path) -> None:
    from helpers.tiny_causal_lms import tiny_model, tokenizer
    from lora_scripts.adapters.lora import attach
    from lora_scripts.families.causal_lm import CausalLanguageModel
    from lora_scripts.models.shards import shard_language_model, unsharded_parts
    from lora_scripts.processes import joined_processes

    with joined_processes("cpu") as processes:
        tiny_model(kind)
        gc.freeze()  # all that is imported by now is not looked through again and again
        model = tiny_model(kind, num_hidden_layers=12, hidden_size=64, intermediate_size=256).requires_grad_(False)
        num_bytes = [sum(4 * p.numel() for p in part.parameters()) for part in (model, model.base_model.layers[0])]
        before = tensor_bytes() - num_bytes[0]
        tied = sum(4 * p.numel() for p in unsharded_parts(model))
        shards = shard_language_model(model, list(model.base_model.layers), kind, torch.device("cpu"))
        family = CausalLanguageModel(model, tokenizer(), shards=shards)
        adapter = attach(family.components, {"language_model": ["q_proj", "down_proj"]}, rank=2, alpha=2.0)
        seen: list[int] = []
        for layer in family.blocks():
            for part in layer.children():
                part.register_forward_hook(lambda *_: seen.append(tensor_bytes() - before))
        tokens = torch.arange(2)[None]
        for parameter in adapter.parameters():
            parameter.register_hook(lambda grad: seen.append(tensor_bytes() - before))
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        assert all(p.grad is not None for p in adapter.parameters())
        del loss
        result = {
            "weights": num_bytes[0],
            "layer": num_bytes[1],
            "tied": tied,
            "cut": shards.all_bytes,
            "own": shards.own_bytes,
            "between": tensor_bytes() - before,
            "largest": max(seen),
        }
        (out / f"memory-{processes.index}.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1], Path(sys.argv[2]))
