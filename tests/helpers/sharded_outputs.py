"""Started by torch's launcher: models in shards compute what whole ones do, also where their attention cannot be packed.

Argument: folder for a file that says that a process came to its end.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lora_scripts.processes import Processes


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("attention of a kind that is not known")


def main(out: Path) -> None:
    from lora_scripts.models import segment_attention
    from lora_scripts.processes import joined_processes

    with joined_processes("cpu") as processes, torch.no_grad():
        for kind in ("llama", "gemma"):
            for attention in (segment_attention.segment_attention, refuse):
                segment_attention._at_work = attention
                compare(kind, processes, packs=attention is not refuse)
        (out / f"done-{processes.index}").touch()


def compare(kind: str, processes: Processes, packs: bool) -> None:
    """All processes together, the first alone, and together again."""
    from helpers.tiny_causal_lms import tiny_model, tokenizer
    from lora_scripts.families.causal_lm import CausalLanguageModel
    from lora_scripts.families.protocol import Batch
    from lora_scripts.models.shards import shard_language_model

    tokens = torch.arange(24).view(2, 12)
    places = torch.arange(1, 12).repeat(2, 1)
    batch = Batch({"tokens": tokens, "targets": places}, [], ["a", "b"], filled={"tokens": [12, 9], "targets": [11, 8]})
    whole = CausalLanguageModel(tiny_model(kind).requires_grad_(False), tokenizer())
    expected = whole.predict(batch, None)  # type: ignore[arg-type]  # nothing is drawn
    model = tiny_model(kind).requires_grad_(False)
    shards = shard_language_model(model, list(model.base_model.layers), kind, torch.device("cpu"))
    family = CausalLanguageModel(model, tokenizer(), shards=shards)
    assert family.packs == whole.packs == packs
    assert torch.equal(family.predict(batch, None), expected)  # type: ignore[arg-type]
    with replace(processes, shards=shards).first_alone() as alone:
        if alone:
            assert torch.equal(family.predict(batch, None), expected)  # type: ignore[arg-type]
            assert torch.equal(model(input_ids=tokens).logits, whole.model(input_ids=tokens).logits)
    assert torch.equal(family.predict(batch, None), expected)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]))
