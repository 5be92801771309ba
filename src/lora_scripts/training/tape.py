"""What a function does with tensors, written down while it runs once, and repeated as a plain list of operations.

A pass through a small model is a few thousand operations of some ten microseconds each. On a CPU, Python with its modules and
autograd with its graph take a quarter of that time, although in every pass the same operations follow one another. Here they are
collected below autograd, with the backward pass among them, and become the lines of one Python function. Tensors live as long as a
later line reads them.

What is no operation on a tensor is repeated as it was: numbers, shapes, the tensors that are neither inputs nor made on the way
(weights, by reference, so changes in place are seen). A decision that Python takes on a number is checked in every repetition.

Source: torch.utils._python_dispatch, TorchDispatchMode; the idea of a tape in Griewank and Walther 2008, Evaluating Derivatives.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DecisionError", "Tape", "TapeFaultError", "record"]

aten = torch.ops.aten

QUICK: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add, aten.add_.Tensor: Tensor.add_, aten.addmm.default: torch.addmm, aten.addmm_.default: Tensor.addmm_,
    aten.bmm.default: torch.bmm, aten.bmm.out: torch.bmm, aten.cat.default: torch.cat, aten.clone.default: torch.clone,
    aten.copy_.default: Tensor.copy_, aten.div.Tensor: torch.div, aten.mm.default: torch.mm, aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: Tensor.mul_, aten.native_group_norm.default: torch.native_group_norm,
    aten.native_layer_norm.default: torch.native_layer_norm, aten.new_empty.default: Tensor.new_empty, aten.permute.default: torch.permute,
    aten.select.int: torch.select, aten.split_with_sizes.default: torch.split_with_sizes, aten.t.default: torch.t,
    aten.transpose.int: torch.transpose, aten.unsqueeze.default: torch.unsqueeze, aten.view.default: Tensor.view,
}  # fmt: skip
"""Operations that torch also has as Python functions of the same arguments, which take up to a microsecond less to call."""

SAME = (aten.detach.default, aten.alias.default)
"""Operations whose result is their input, in the same place."""


class TapeFaultError(Exception):
    """The function does what cannot be repeated; the text says what."""


class DecisionError(Exception):
    """A number on which Python had decided came out otherwise: the repetition is void."""


@dataclass(frozen=True)
class _Line:
    """One operation.

    Attributes:
        reads, makes: names of tensors.
        text: as Python.
        needed: it changes a tensor or checks one, so it stays though nobody reads what it makes.
    """

    text: str
    reads: frozenset[str]
    makes: tuple[str, ...]
    needed: bool


class Tape:
    """A recorded function of some tensors."""

    def __init__(self, run: Callable[..., list[Tensor | None]], num_operations: int) -> None:
        self._run = run
        self.num_operations = num_operations

    def __call__(self, inputs: Iterable[Tensor]) -> list[Tensor | None]:
        """The function's results for other inputs of the same shapes, without a gradient.

        Raises:
            DecisionError: with these numbers the function would have gone another way. Nothing but what it made has changed.
        """
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return self._run(*inputs)


def record(
    function: Callable[[], Sequence[Tensor | None]], inputs: Sequence[Tensor], changing: Iterable[Tensor]
) -> Tape:
    """How the function, which runs to its end once, comes to its results.

    Args:
        function: of the inputs, which it reads from where it knows them.
        inputs: tensors of which a repetition is given others.
        changing: tensors that are read where they are, and hold other numbers in every repetition.
    Raises:
        TapeFaultError: it draws random numbers, changes what it did not make, or depends on numbers in other ways.
    """
    writer = _Writer(inputs, changing)
    with writer:
        results = list(function())
    if writer.fault is not None:
        raise TapeFaultError(writer.fault)
    return writer.tape(results)


class _Writer(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, inputs: Sequence[Tensor], changing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fault: str | None = None
        self._lines: list[_Line] = []
        self._constants: dict[str, Any] = {}
        self._constant_names: dict[int, str] = {}
        self._names: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._num_names = 0
        self._inputs = [self._named(tensor) for tensor in inputs]
        self._changing = {id(tensor) for tensor in changing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = torch.get_rng_state() if torch.Tag.nondeterministic_seeded in func.tags else None
        out = func(*args, **kwargs)
        if before is not None and (not torch.equal(before, torch.get_rng_state()) or kwargs.get("generator")):
            self.fault = self.fault or f"{func} draws random numbers"
        if self.fault is None:
            try:
                self._write(func, args, kwargs, out)
            except TapeFaultError as fault:
                # Raised when the function is through: within a backward pass it would come out as another error.
                self.fault = str(fault)
        return out

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        tensors = list(_tensors((args, kwargs)))
        if func in SAME and (name := self._name(args[0])) is not None:
            self._keep(out, name)  # the same numbers in the same place
            return
        if func.is_view and self._is_constant(tensors):
            return  # of a weight: it is made once
        if not tensors and not isinstance(out, Tensor):
            return  # it says something of formats
        masked = func is not aten.index.Tensor or any(each.dtype in (torch.bool, torch.uint8) for each in tensors[1:])
        if torch.Tag.dynamic_output_shape in func.tags and masked:
            raise TapeFaultError(f"the shape that {func} gives depends on numbers")
        changed = self._changed(func, args, kwargs)
        reads = frozenset(name for tensor in tensors if (name := self._name(tensor)) is not None)
        words = [self._word(value) for value in args] + [f"{key}={self._word(value)}" for key, value in kwargs.items()]
        call = f"{self._constant(QUICK.get(func, func._op))}({', '.join(words)})"
        if func is aten._local_scalar_dense.default:
            if not isinstance(out, bool):
                raise TapeFaultError("Python reads a number")
            self._lines.append(_Line(f"if {call} is not {out}: raise DecisionError", reads, (), needed=True))
            return
        if out is None:  # a check that raises
            self._lines.append(_Line(call, reads, (), needed=True))
            return
        if isinstance(out, Tensor):
            made = [self._made(out)]
            text = f"{made[0]} = {call}"
        elif isinstance(out, (list, tuple)) and all(each is None or isinstance(each, Tensor) for each in out):
            made = ["_" if each is None else self._made(each) for each in out]
            text = f"{', '.join(made)}{',' * (len(made) == 1)} = {call}"
        else:
            raise TapeFaultError(f"{func} gives {type(out).__name__}")
        self._lines.append(_Line(text, reads, tuple(made), needed=changed))

    def _changed(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the operation writes into one of its arguments, which must be tensors that were made on the way."""
        written = False
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = kwargs.get(argument.name) if place >= len(args) or argument.kwarg_only else args[place]
            for tensor in _tensors(given):
                written = True
                if self._name(tensor) in (None, *self._inputs):
                    raise TapeFaultError(f"{func} changes a tensor that was there before")
        return written

    # Names -------------------------------------------------------------------------------------------------------------

    def _keep(self, tensor: Tensor, name: str) -> None:
        key = id(tensor)
        self._names[key] = weakref.ref(tensor, lambda _: self._names.pop(key, None)), name

    def _named(self, tensor: Tensor) -> str:
        self._num_names += 1
        name = f"t{self._num_names}"
        self._keep(tensor, name)
        return name

    def _name(self, tensor: Tensor) -> str | None:
        """Of an input, or of what was made on the way."""
        reference, name = self._names.get(id(tensor), (None, None))
        return name if reference is not None and reference() is tensor else None

    def _made(self, tensor: Tensor) -> str:
        return self._name(tensor) or self._named(tensor)

    def _is_constant(self, tensors: Sequence[Tensor]) -> bool:
        return all(self._name(tensor) is None and id(tensor) not in self._changing for tensor in tensors)

    def _constant(self, value: Any) -> str:
        name = self._constant_names.get(id(value))
        if name is None:
            name = self._constant_names[id(value)] = f"c{len(self._constants)}"
            self._constants[name] = value  # which also keeps its id from being given away
        return name

    def _word(self, value: Any) -> str:
        """An argument as Python."""
        if isinstance(value, Tensor):
            return self._name(value) or self._constant(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self._word, value))}]"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self._constant(value)

    # The function ------------------------------------------------------------------------------------------------------

    def tape(self, results: Sequence[Tensor | None]) -> Tape:
        """The lines as a function, without those that nobody needs."""
        words = [self._word(result) for result in results]
        read_later = set(words)
        body: list[str] = []
        num_operations = 0
        for line in reversed(self._lines):
            if not line.needed and read_later.isdisjoint(line.makes):
                continue
            num_operations += 1
            last = sorted((line.reads | set(line.makes)) - read_later - {"_"})
            if last:
                body.append(f"    del {', '.join(last)}")
            body.append(f"    {line.text}")
            read_later |= line.reads
        head = f"def run({', '.join(self._inputs)}):"
        source = "\n".join([head, *reversed(body), f"    return [{', '.join(words)}]"])
        scope: dict[str, Any] = {**self._constants, "DecisionError": DecisionError}
        exec(compile(source, "<recorded pass>", "exec"), scope)  # noqa: S102 - names and numbers of our own; a loop that fills in arguments takes 0.4 us an operation more
        return Tape(scope["run"], num_operations)


def _tensors(value: Any) -> Iterable[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
