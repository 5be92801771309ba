"""A whole pass, forward and backward, as one CUDA graph for every shape of batch.

Small pictures and batches leave a GPU waiting for Python, which starts a few thousand kernels per pass. A graph starts them all
at once. It repeats the kernels as they were recorded, on the same addresses, so a pass has buffers that stay where they are:
the batch is copied in, its noise with it; gradients are added into tensors of their own; losses are copied out. Nothing else of
the pass may depend on Python or on the CPU (`speed_rules.graph_obstacles`).

Where there is no CUDA the recorded pass is simply called: the same buffers, copies and sums. A recorded graph is compared, before
it is used, with the pass that it was recorded from.

Source: torch.cuda.CUDAGraph, "Whole-network capture".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lora_scripts.families.protocol import Batch, Loss
    from lora_scripts.training.events import Events

__all__ = ["GraphFaultError", "GraphsOrPlain", "StaticPasses", "differentiated"]

WARM_UPS = 2
"""Passes before recording: libraries choose their kernels and take their workspaces in them."""
TOLERANCE = 2e-2
"""Share of the largest number by which a recorded pass may differ: kernels that add in any order differ in half precision."""


class GraphFaultError(Exception):
    """A pass cannot be recorded, or does something else when it is repeated."""


@dataclass(frozen=True)
class _Shape:
    """What one shape of batch has.

    Attributes:
        inputs: the batch's tensors by name, where the pass reads them.
        loss: where the pass leaves it.
        replay: computes `loss` from `inputs` and adds to the gradients.
    """

    inputs: dict[str, Tensor]
    loss: Loss
    replay: Callable[[], None]


class StaticPasses:
    """Runs passes over batches whose tensors hold all that is random; one recording for each shape.

    Gradients end where a plain backward pass puts them, in `parameter.grad`, and equal its to the bit. A parameter that the loss
    does not depend on keeps none.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Loss],
        scale: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        device: torch.device,
    ) -> None:
        """Args:
        forward: the loss of a batch, from its tensors alone.
        scale: what is differentiated, from the total loss; of a `GradScaler`.
        """
        self._forward, self._scale, self._device = forward, scale, device
        self._parameters = list(parameters)
        self._grads: dict[int, Tensor] = {}
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._pool: object | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: Batch) -> Loss:
        """The loss of the batch; its gradient has been added.

        Raises:
            GraphFaultError: this shape cannot be recorded; gradients are as before, so the pass can be run in another way.
        """
        shape = self._shapes.get(batch.form)
        if shape is None:
            shape = self._shapes[batch.form] = self._recorded(batch)
        for name, tensor in batch.tensors.items():
            shape.inputs[name].copy_(tensor, non_blocking=True)
        self._take_over_gradients()
        shape.replay()
        return _copy(shape.loss)

    def forget(self) -> None:
        """Drops all recordings, and the memory that they hold."""
        self._shapes.clear()
        self._pool = None

    @property
    def num_shapes(self) -> int:
        return len(self._shapes)

    # Gradients ---------------------------------------------------------------------------------------------------------

    def _take_over_gradients(self) -> None:
        """Makes every parameter's gradient the tensor that passes add to, with the value that it has now."""
        empty = []
        for index, grad in self._grads.items():
            parameter = self._parameters[index]
            if parameter.grad is None:
                empty.append(grad)
            elif parameter.grad is not grad:
                grad.copy_(parameter.grad)
            parameter.grad = grad
        if empty:
            torch._foreach_zero_(empty)

    def _add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds what a pass gave, in place."""
        pairs = [(self._grads[i], grad) for i, grad in enumerate(grads) if grad is not None]
        torch._foreach_add_([own for own, _ in pairs], [grad for _, grad in pairs])

    def _differentiated(self, batch: Batch) -> tuple[Loss, tuple[Tensor | None, ...]]:
        return differentiated(self._forward(batch), self._scale, self._parameters)

    # Recording ---------------------------------------------------------------------------------------------------------

    def _recorded(self, batch: Batch) -> _Shape:
        inputs = {name: tensor.detach().clone() for name, tensor in batch.tensors.items()}
        static = batch.with_tensors(inputs)
        if self._device.type == "cuda":
            return self._captured(static, inputs)
        loss, grads = self._differentiated(static)
        self._make_gradients(grads)
        loss = _copy(loss)

        def replay() -> None:
            now, grads = self._differentiated(static)
            _write(now, loss)
            self._add(grads)

        return _Shape(inputs, loss, replay)

    def _captured(self, static: Batch, inputs: dict[str, Tensor]) -> _Shape:
        """The pass as a graph, compared with the pass itself."""
        current = torch.cuda.current_stream(self._device)
        # One stream for all warm-ups and recordings: it has its workspaces before anything is recorded, and a pool may be shared.
        stream = self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                expected, grads = self._differentiated(static)
        current.wait_stream(stream)
        self._make_gradients(grads)
        self._take_over_gradients()
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,  # type: ignore[arg-type]
                    stream=stream,
                    capture_error_mode="thread_local",  # the thread that makes batches ahead goes on pinning and copying
                ),
            ):
                loss, new = self._differentiated(static)
                self._add(new)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch leaves its own in place where ending a broken recording fails
            if (short := _out_of_memory(error)) is not None:
                raise short from None
            raise GraphFaultError(str(error).splitlines()[0][:160]) from None
        self._pool = self._pool or graph.pool()
        before = {index: grad.clone() for index, grad in self._grads.items()}
        for grad in self._grads.values():
            grad.zero_()
        graph.replay()
        found = [self._grads.get(index) for index in range(len(grads))]
        same = _close(loss.total, expected.total) and all(
            _close(a, b) for a, b in zip(found, grads, strict=True) if a is not None and b is not None
        )
        for index, grad in before.items():
            self._grads[index].copy_(grad)
        if not same:
            raise GraphFaultError("the recorded pass gives other numbers than the pass itself")
        return _Shape(inputs, loss, graph.replay)

    def _make_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Room for the gradients of parameters that a pass reaches for the first time."""
        for index, grad in enumerate(grads):
            if grad is not None and index not in self._grads:
                self._grads[index] = torch.zeros_like(self._parameters[index])


def differentiated(
    loss: Loss, scale: Callable[[Tensor], Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[Loss, tuple[Tensor | None, ...]]:
    """The loss without its graph, and the gradients of its scaled total; None for a parameter that it does not depend on."""
    grads = torch.autograd.grad(scale(loss.total), parameters, allow_unused=True)
    return replace(loss, total=loss.total.detach()), grads


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """The lack of memory that was the reason, also where another error came of it."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error


def _copy(loss: Loss) -> Loss:
    """The loss in tensors of its own, which no later pass overwrites."""
    levels = None if loss.levels is None else loss.levels.clone()
    return replace(
        loss, total=loss.total.detach().clone(), per_example=loss.per_example.detach().clone(), levels=levels
    )


def _write(loss: Loss, target: Loss) -> None:
    target.total.copy_(loss.total)
    target.per_example.copy_(loss.per_example)
    if loss.levels is not None and target.levels is not None:
        target.levels.copy_(loss.levels)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding; both not finite counts, because a bad step is the loop's to judge."""
    if not bool(b.isfinite().all()):
        return True
    size = b.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return bool(((a - b).abs().max() <= TOLERANCE * size).item())


class GraphsOrPlain:
    """Recorded passes as long as they can be recorded; plain ones from the first fault on, with one message."""

    def __init__(self, graphs: StaticPasses, plain: Callable[[Batch], Loss], events: Events) -> None:
        self._graphs: StaticPasses | None = graphs
        self._plain, self._events = plain, events

    def __call__(self, batch: Batch) -> Loss:
        if self._graphs is not None:
            try:
                return self._graphs(batch)
            except GraphFaultError as fault:
                self._events.note(f"cuda_graphs: switched off for this run ({fault}).", "warning")
                self._graphs = None
        return self._plain(batch)

    def forget(self) -> None:
        if self._graphs is not None:
            self._graphs.forget()
