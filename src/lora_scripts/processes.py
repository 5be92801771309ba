"""One run on several processes, each with a device of its own: `torchrun --nproc-per-node 2 train.py --config ...`.

Every process takes its share of each step's examples; then the adapter's gradients, a few megabytes, are summed. Every
process holds the whole frozen model, or, where that is too large for one device, a shard of it (`models.shards`). Noise belongs to the example and not to the process, so N processes compute what one does with N
times the accumulation. The first process alone writes: logs, checkpoints, previews and the finished file.

Source: torch.distributed, with gloo on CPUs and NCCL on GPUs; nothing of our own underneath.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lora_scripts.errors import ConfigError, TrainingError
from lora_scripts.preflight.wording import gigabytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_scripts.config import RunConfig
    from lora_scripts.models.shards import Shards
    from lora_scripts.training.chosen import Chosen

__all__ = ["ONE", "LostProcessError", "Processes", "joined_processes", "local_index", "spread_over"]

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=12)
"""The others wait while the first encodes, renders or saves; a process that has ended is noticed at once all the same."""


class LostProcessError(TrainingError):
    """Another process of the run has ended, so that no step can be completed."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        index: of this process, 0 for the first.
        count: of all.
        shards: of the frozen weights, where a pass takes all processes.
    """

    index: int = 0
    count: int = 1
    shards: Shards | None = None

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def described(self) -> str:
        """For people: how many there are, and what each has."""
        text = f"{self.count}, each with its share of every step"
        if self.shards is None:
            return text
        own, whole = gigabytes(self.shards.own_bytes), gigabytes(self.shards.all_bytes)
        return f"{text} and of the frozen weights: {own} of {whole} here"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What of the items is this process's part; all of them where it is alone."""
        return items[self.index :: self.count]

    def joined(self, results: Sequence[T]) -> list[T]:
        """What all processes have made of their shares, one result for each item, in the order of the items.

        Raises:
            LostProcessError: a process has ended.
        """
        shares = self.gather(results)
        return [shares[place % self.count][place // self.count] for place in range(sum(map(len, shares)))]

    def sum_step(self, parameters: Sequence[nn.Parameter], total: Tensor, count: int) -> tuple[Tensor, int]:
        """Sums gradients, loss and count over all processes; every process has the same bits afterwards.

        Raises:
            LostProcessError: a process has ended.
        """
        if self.count == 1:
            return total, count
        import torch

        with _talking():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            together = torch.cat([grad.reshape(-1) for grad in grads])
            torch.distributed.all_reduce(together)
            parts = torch.split(together, [grad.numel() for grad in grads])
            for parameter, summed in zip(parameters, parts, strict=True):
                parameter.grad = summed.view_as(parameter)
            numbers = torch.cat([total.double().reshape(1), total.new_tensor([count], dtype=torch.float64)])
            torch.distributed.all_reduce(numbers)
        return numbers[0].to(total.dtype), round(numbers[1].item())

    def idle_passes(self, items: Sequence[T], num_passes: Callable[[Sequence[T]], int]) -> int:
        """Passes that this process owes the others beside those of its own share, where a pass takes all of them.

        Args:
            num_passes: of a share.
        """
        if self.shards is None:
            return 0
        passes = [num_passes(items[index :: self.count]) for index in range(self.count)]
        return max(passes) - passes[self.index]

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A block with passes in it.

        Raises:
            LostProcessError: a process has ended that the passes take.
        """
        try:
            yield
        except RuntimeError as error:
            if self.shards is None or not _is_lost_process(error):
                raise
            raise _lost(error) from None

    @contextmanager
    def first_alone(self) -> Iterator[bool]:
        """A block in which the first process may use the model while the others do nothing; true in the first.

        The others wait only where the model needs them: then they reach the block's inside when the first has left it.

        Raises:
            LostProcessError: a process has ended that the model needs.
        """
        if self.shards is None:
            yield self.is_first
        elif self.is_first:
            with self.passing(), self.shards.leading():
                yield True
        else:
            with _talking():
                self.shards.lend()
            yield False

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return any(self.gather(flag))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.count == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.count
        with _talking():
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process; in the others it is not called."""
        if self.count == 1:
            return make()
        import torch

        with self.first_alone() as alone:
            values: list[Any] = [make() if alone else None]
        with _talking():
            torch.distributed.broadcast_object_list(values, src=0)
        result: T = values[0]
        return result

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The block runs in the first process, and only when that is done in all others: they find its files."""
        with self.first_alone() as alone:
            if alone:
                yield
        self._meet()
        if not self.is_first:
            yield

    def _meet(self) -> None:
        if self.count > 1:
            import torch

            with _talking():
                torch.distributed.barrier()


ONE = Processes()
"""A process that is alone."""


def local_index() -> int:
    """Number of this process among those of its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """This process in the company that `torchrun` or `accelerate launch` started it in; alone without one.

    Args:
        device: as in the config; processes on CPUs talk through gloo, those on GPUs through NCCL.
    Raises:
        ConfigError: the launcher's settings are incomplete, or a single GPU was named for several processes.
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        yield ONE
        return
    import torch

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if ":" in device:
        raise ConfigError(f"device: {device}: names one GPU, but {count} processes were started. Set device: cuda.")
    if on_gpu:
        if local_index() >= torch.cuda.device_count():
            raise ConfigError(
                f"{count} processes were started, but there are {torch.cuda.device_count()} GPUs here. "
                "Start at most one process for each: torchrun --nproc-per-node."
            )
        torch.cuda.set_device(local_index())
    try:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=LONGEST_WAIT)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the processes of this run did not find each other ({str(error).splitlines()[0]}). Start them with "
            "torchrun or accelerate launch, and with WORLD_SIZE unset for a run on one process."
        ) from None
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
        gc.collect()  # what still holds the group (a model in shards, in a cycle) must go before it does, or the process aborts
    finally:
        torch.distributed.destroy_process_group()


def spread_over(config: RunConfig, processes: Processes, began: Chosen | None) -> RunConfig:
    """The config of the same run on one process: accumulation takes in what the other processes do.

    A run that goes on with another number of processes keeps the steps that it began with.

    Args:
        began: of the run that is resumed.
    """
    steps = config.gradient_accumulation_steps
    count = processes.count
    if began is not None and steps * began.num_processes == began.gradient_accumulation_steps:
        count = began.num_processes
    return config if count == 1 else config.model_copy(update={"gradient_accumulation_steps": steps * count})


@contextmanager
def _talking() -> Iterator[None]:
    """Turns the library's errors into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from None


def _lost(error: RuntimeError) -> LostProcessError:
    return LostProcessError(
        "Another process of this run has ended, so this one ends too; what it printed or its machine's log says why "
        f"(seen here as: {_shortened(error)}). What is saved is whole: run the same command again to go on from there."
    )


def _is_lost_process(error: RuntimeError) -> bool:
    """Whether it comes from talking with other processes; gloo has no exception of its own."""
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _shortened(error: RuntimeError) -> str:
    """The library's words without its source file in front and its guesses behind."""
    return str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0][:120]


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"the environment variable {name} is {text!r}, which is no number of processes. Unset it.")
    return int(text)
