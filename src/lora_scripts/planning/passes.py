"""The passes of a run that decide about its memory: which examples are in them, what they take as predicted and as measured."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from lora_scripts.config import RunConfig
from lora_scripts.data.sampler import Sample, StepPlan
from lora_scripts.low_bit_choice import low_bit_kind
from lora_scripts.models.block_swap import swap_saving
from lora_scripts.models.low_bit_layers import low_bit_copies
from lora_scripts.models.quantised import stored_bytes
from lora_scripts.models.shards import sharding_saving
from lora_scripts.planning.activations import PassTrace, trace_pass
from lora_scripts.planning.memory_plan import MemoryNeeds, MemoryPlan, PassBytes, optimizer_bytes
from lora_scripts.planning.quantised_bytes import Quantization, quantised_saving
from lora_scripts.planning.trial_pass import largest_pass, trial_pass
from lora_scripts.speed_rules import swapped_blocks

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.data.training_data import TrainingData, TrainingExample
    from lora_scripts.families.protocol import ModelFamily

__all__ = ["Passes", "longest_pass"]

MOST_USES = 100_000
"""Examples of a run that are looked through for its longest pass: about a second. A longer one that comes later is cut."""


class Passes:
    """Passes of different sizes over the examples that take most.

    Args:
        adapter: attached to the family.
        data: what trains; only its batches are asked for.
        num_processes: of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        family: ModelFamily,
        adapter: Adapter,
        data: TrainingData,
        device: torch.device,
        num_processes: int = 1,
    ) -> None:
        self.num_processes = num_processes
        self._config, self._family, self._adapter = config, family, adapter
        self._data, self._device = data, device
        self._traced = cache(self._trace)
        self._longest = cache(lambda size: longest_pass(data.examples, config, size))

    def with_data(self, data: TrainingData) -> Passes:
        """The same model on other examples."""
        return Passes(self._config, self._family, self._adapter, data, self._device, self.num_processes)

    def with_config(self, config: RunConfig) -> Passes:
        """The same passes, of which nothing is predicted anew, where other settings decide what else takes memory."""
        other = copy(self)
        other._config = config
        other.__dict__.pop("needs", None)
        return other

    @property
    def weight_bytes(self) -> int:
        """Of the components that take part in a step, adapter included, as far as they are on the device at a time."""
        stored = sum(stored_bytes(self._family.components[name]) for name in self._adapter.groups())
        if self._config.shard_model:
            stored -= self.saved_by_sharding()
        return stored - self.saved_by_swapping(swapped_blocks(self._config)) + self.low_bit_bytes

    @property
    def low_bit_bytes(self) -> int:
        """Of the weights' copies in 8 bits."""
        kind = low_bit_kind(self._config)
        return low_bit_copies(self._family.wide_parts(), kind) if kind else 0

    @property
    def num_blocks(self) -> int:
        """That can be swapped."""
        return len(self._family.blocks())

    def saved_by_swapping(self, count: int) -> int:
        """Bytes of the weights that so many swapped blocks save."""
        return swap_saving(self._family.blocks(), count)

    def saved_by_sharding(self) -> int:
        """Bytes of a language model's weights that a process saves where they are cut over all of the run's."""
        models: Sequence[Any] = list(self._family.components.values())
        return sum(sharding_saving(model, self._family.blocks(), self.num_processes) for model in models)

    def saved_by(self, quantization: Quantization) -> int:
        """Bytes of the weights that it would save; of a model that is not quantised yet."""
        return quantised_saving([self._family.components[name] for name in self._adapter.groups()], quantization)

    @cached_property
    def needs(self) -> MemoryNeeds:
        """All that a step takes, as predicted."""
        count = self._adapter.num_parameters
        moments = count * optimizer_bytes(self._config)
        gradients = sum(p.numel() * p.element_size() for p in self._adapter.parameters())
        return MemoryNeeds(self.weight_bytes, moments, self.predicted(), gradients=gradients)

    def cost(self, size: int) -> int:
        """Pixels or tokens of the largest pass of so many examples."""
        return sum(self._data.examples[index].cost for index in self._longest(size))

    def trace(self, size: int, checkpointing: bool) -> PassTrace:
        """What the largest pass of so many examples takes, found with fake tensors; each is asked for once.

        Raises:
            UnpredictableError: something in the model cannot run with fake tensors.
        """
        return self._traced(min(size, self._most), checkpointing)

    def predicted(self) -> PassBytes:
        """Bytes of passes. Where examples are all alike, only the smallest and the largest pass are traced.

        Those between then lie on the line between them, or below: the worst moment may move with the size, and a maximum of
        straight lines lies below its chord.
        """

        def of_pass(size: int, checkpointing: bool) -> int:
            size, largest = min(size, self._most), self._most
            alike = self.cost(size) * largest == self.cost(largest) * size
            if size in (1, largest) or not alike:
                return self.trace(size, checkpointing).peak_bytes
            one, all_ = self.trace(1, checkpointing).peak_bytes, self.trace(largest, checkpointing).peak_bytes
            return one + round((all_ - one) * (size - 1) / (largest - 1))

        return of_pass

    def measure(self, plan: MemoryPlan) -> int | None:
        """Bytes that a pass of this plan really takes, weights left out; None when memory runs out."""
        self._family.set_checkpointing(plan.checkpointing)
        samples = self._samples(min(plan.micro_batch, self._most))
        trial = trial_pass(self._family, self._adapter, self._data, samples, self._device, self._config.seed)
        return None if trial is None else trial.added_bytes

    @cached_property
    def _most(self) -> int:
        """Examples of the largest pass that there can be; a shape that cannot fill a batch makes smaller ones."""
        return len(self._longest(self._config.micro_batch))

    def _trace(self, size: int, checkpointing: bool) -> PassTrace:
        from lora_scripts.training.draws import Draws

        self._family.set_checkpointing(checkpointing)
        draws = Draws(self._config.seed)
        batch = self._data.batch(self._samples(size), self._device)
        return trace_pass(lambda b: self._family.loss(b, draws).total, batch, list(self._adapter.parameters()))

    def _samples(self, size: int) -> Sequence[Sample]:
        chosen = self._longest(size)
        return [Sample(index, f"plan/{i}", (i / size, 1 / size)) for i, index in enumerate(chosen)]


def longest_pass(examples: Sequence[TrainingExample], config: RunConfig, size: int) -> list[int]:
    """Places of the examples of the pass of at most `size` that takes most, of all passes of the run.

    Pictures of one shape are all alike. Dialogues are not: four of the longest may never meet, and to count on it would cost
    most runs half of their speed, so the passes that there will be are looked at, in their order.
    """
    largest = largest_pass(examples, size)
    same = [place for place, example in enumerate(examples) if example.shape == largest[0].shape]
    if len({examples[place].cost for place in same}) == 1:
        return [same[i % len(same)] for i in range(len(largest))]
    plan = StepPlan.of(examples, config.step_size, config.seed)
    steps = config.max_steps or (config.epochs or 10) * plan.steps_per_epoch
    steps = min(steps, max(plan.steps_per_epoch, MOST_USES // config.step_size))
    passes = (uses for step in range(steps) for uses in plan.micro_batches(plan.step(step), size))
    longest = max(passes, key=lambda uses: sum(examples[use.index].cost for use in uses))
    return [use.index for use in longest]
