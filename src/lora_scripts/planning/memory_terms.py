"""The bytes of a step by what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_scripts.preflight.wording import gigabytes

if TYPE_CHECKING:
    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.config import RunConfig
    from lora_scripts.planning.memory_plan import MemoryNeeds, MemoryPlan
    from lora_scripts.planning.passes import Passes

__all__ = ["Term", "memory_terms"]


@dataclass(frozen=True)
class Term:
    """Part of what a step takes at its peak.

    Attributes:
        name: stable, for programs too: "frozen weights".
        note: what it depends on, for people.
    """

    name: str
    num_bytes: int
    note: str = ""


def memory_terms(
    passes: Passes, adapter: Adapter, needs: MemoryNeeds, plan: MemoryPlan, config: RunConfig, cuda_bytes: int
) -> list[Term]:
    """What a plan's bytes are for; they add up to `plan.num_bytes`.

    Args:
        cuda_bytes: guessed, counted among the `needs`; 0 where CUDA has taken its part already.
    """
    trace = passes.trace(plan.micro_batch, plan.checkpointing)
    other = passes.trace(plan.micro_batch, not plan.checkpointing)
    weights = sum(p.numel() * p.element_size() for p in adapter.parameters())
    waiting = needs.gradients if plan.accumulation > 1 else 0
    cost = passes.cost(plan.micro_batch)
    size = f"{cost:,} tokens at most" if config.task_type == "text-generation" else f"{cost:,} pixels at most"
    average = ", and the average of the weights" if config.ema_decay else ""
    quantised = "" if config.quantization == "none" else f"in {config.quantization}, head and embeddings not"
    if config.block_swap:
        quantised = f"{config.block_swap} blocks of the model are in the computer's memory"
    if passes.low_bit_bytes:
        quantised = f"with copies in {config.low_bit_matmul}, {gigabytes(passes.low_bit_bytes)}"
    if config.shard_model:
        quantised = f"a shard of {passes.num_processes}, and layers that are whole for a moment"
    on, off = ("on", "off") if plan.checkpointing else ("off", "on")
    terms = [
        Term("frozen weights", passes.weight_bytes - weights - passes.saved_by(config.quantization), quantised),
        Term("adapter", weights, f"{adapter.num_parameters:,} weights in float32"),
        Term("gradients", waiting + trace.gradient_bytes, "of the adapter, at the worst moment"),
        Term("optimizer", needs.optimizer, f"the state of {config.optimizer}{average}"),
        Term(
            "activations",
            trace.kept_bytes,
            f"a pass of {plan.micro_batch}, {size}; checkpointing {on} ({off}: {gigabytes(other.kept_bytes)})",
        ),
        Term("for a moment", trace.momentary_bytes, "scores of a chunk of tokens, what is on its way between layers"),
    ]
    if cuda_bytes:
        terms.append(Term("CUDA itself", cuda_bytes, "a guess"))
    rest = plan.num_bytes - sum(term.num_bytes for term in terms)
    return [*terms, Term("kernels", rest, "a guess: a tenth of a pass for what they take by themselves")]
