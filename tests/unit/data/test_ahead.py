"""Batches made ahead are those that are made on demand, whatever is announced."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from lora_scripts.data.ahead import BatchesAhead, moved
from lora_scripts.data.sampler import Sample
from lora_scripts.families.protocol import Batch

CPU = torch.device("cpu")


def uses(*indices: int) -> list[Sample]:
    return [Sample(index, f"0/{index}", None) for index in indices]


class Making:
    """Makes batches, and remembers of what and in which threads."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []
        self.threads: set[str] = set()

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        self.made.append([sample.index for sample in samples])
        self.threads.add(threading.current_thread().name)
        values = torch.tensor([float(sample.index) for sample in samples])
        return Batch({"values": values}, [], [sample.key for sample in samples])


def indices(batch: Batch) -> list[float]:
    return batch.tensors["values"].tolist()


def test_announced_batches_come_in_their_order_each_made_once_in_the_other_thread() -> None:
    making = Making()
    ahead = BatchesAhead(making, CPU, ahead=True)
    passes = [uses(0, 1), uses(2), uses(3, 4), uses(5), uses(6)]
    ahead.expect(passes[:3])
    taken = [ahead.take(each) for each in passes[:2]]
    ahead.expect(passes[3:])
    taken += [ahead.take(each) for each in passes[2:]]
    assert [indices(batch) for batch in taken] == [[0, 1], [2], [3, 4], [5], [6]]
    assert making.made == [[0, 1], [2], [3, 4], [5], [6]]
    assert threading.current_thread().name not in making.threads


def test_another_cut_of_the_step_drops_what_was_announced() -> None:
    making = Making()
    ahead = BatchesAhead(making, CPU, ahead=True)
    ahead.expect([uses(0, 1), uses(2, 3), uses(4, 5)])
    assert indices(ahead.take(uses(0))) == [0]
    assert ahead.num_announced == 0
    assert indices(ahead.take(uses(1))) == [1]


def test_what_goes_wrong_while_making_a_batch_is_raised_where_it_is_taken() -> None:
    def fail(samples: Sequence[Sample]) -> Batch:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    ahead = BatchesAhead(fail, CPU, ahead=True)
    ahead.expect([uses(0)])
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        ahead.take(uses(0))


def test_on_a_cpu_batches_are_made_when_they_are_asked_for() -> None:
    making = Making()
    ahead = BatchesAhead(making, CPU)
    ahead.expect([uses(0)])
    assert making.made == []
    assert indices(ahead.take(uses(0))) == [0]
    assert making.threads == {threading.current_thread().name}


def test_tensors_that_are_there_already_are_not_copied() -> None:
    batch = Making()(uses(1))
    assert moved(batch, CPU).tensors["values"] is batch.tensors["values"]
