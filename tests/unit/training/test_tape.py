"""A tape repeats a function's operations: with other numbers, to the bit, and not where something else decides."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_scripts.training.tape import DecisionError, TapeFaultError, record


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recorded(function: Callable[[Tensor], Any], x: Tensor, *changing: Tensor) -> Any:
    """The tape of a function that gives one tensor or several."""

    def results() -> list[Tensor]:
        out = function(x)
        return [out] if isinstance(out, Tensor) else list(out)

    return record(results, [x], changing)


def written_in_place(x: Tensor) -> Tensor:
    buffer = torch.zeros(4, 6)
    torch.mul(x, 2.0, out=buffer[:, :3])
    buffer[:, 3:].copy_(x).add_(1.0)
    return buffer.t() @ buffer


def of_lists(x: Tensor) -> list[Tensor]:
    first, second, third = torch.split(x, [1, 1, 1], dim=1)
    return [torch.cat([third, first], dim=1), torch.stack([second, third]), *torch.aminmax(x)]


def with_a_norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, (3,), torch.full((3,), 1.5), None, 1e-5).to(torch.bfloat16)


@pytest.mark.parametrize("function", [written_in_place, of_lists, with_a_norm], ids=lambda f: f.__name__)
def test_other_inputs_give_what_the_function_gives_for_them(function: Callable[[Tensor], Any]) -> None:
    tape = recorded(function, normal(4, 3))
    other = normal(4, 3, seed=1)
    wanted = function(other)
    found = tape([other])
    assert len(found) == (1 if isinstance(wanted, Tensor) else len(wanted))
    for a, b in zip(found, [wanted] if isinstance(wanted, Tensor) else wanted, strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b)


def test_the_backward_pass_is_repeated_and_weights_changed_in_place_are_seen() -> None:
    frozen, weight = normal(5, 3), torch.nn.Parameter(normal(5, 3, seed=2))

    def gradient(x: Tensor) -> list[Tensor]:
        loss = torch.nn.functional.silu(x @ (frozen + weight).t()).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, [weight])]

    tape = recorded(gradient, normal(4, 3), weight)
    with torch.no_grad():
        weight.mul_(-1.5)
    other = normal(4, 3, seed=1)
    found = tape([other])
    assert all(torch.equal(a, b) for a, b in zip(found, gradient(other), strict=True))
    assert not any(each.requires_grad for each in found)


def test_what_nobody_reads_is_left_out_and_views_of_weights_are_made_once() -> None:
    weight = normal(5, 3)

    def wasteful(x: Tensor) -> Tensor:
        x.exp().sum()
        return x @ weight.t()

    assert recorded(wasteful, normal(4, 3)).num_operations == 1


def test_a_tensor_lives_as_long_as_a_later_operation_reads_it() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x + 1.0
        return x

    tape = recorded(chain, normal(4, 3))

    class Watch(TorchDispatchMode):
        most = 0

        def __init__(self) -> None:
            super().__init__()
            self.made: list[weakref.ref[Tensor]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.made.append(weakref.ref(out))
            self.most = max(self.most, sum(each() is not None for each in self.made))
            return out

    x = normal(4, 3)
    with Watch() as watch:
        tape([x])
    assert len(watch.made) == 20
    assert watch.most <= 3


def test_a_decision_that_comes_out_otherwise_voids_the_repetition() -> None:
    tape = recorded(lambda x: x * 2 if bool(x.sum() > 0) else -x, torch.ones(3))
    assert tape([torch.full((3,), 5.0)])[0].tolist() == [10.0, 10.0, 10.0]
    with pytest.raises(DecisionError):
        tape([-torch.ones(3)])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x + torch.rand(3), "rand.default draws random numbers"),
        (lambda x: torch.nn.functional.dropout(x, 0.5), "draws random numbers"),
        (lambda x: x * float(x.sum()), "Python reads a number"),
        (lambda x: x[x > 0], "the shape that aten.index.Tensor gives depends on numbers"),
        (lambda x: x.add_(1.0), "add_.Tensor changes a tensor that was there before"),
    ],
    ids=["random", "dropout", "number", "mask", "in place"],
)
def test_what_cannot_be_repeated_is_refused_with_the_reason(function: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(TapeFaultError, match=reason):
        recorded(function, torch.ones(3))


def test_an_index_of_numbers_is_repeated() -> None:
    table = normal(9, 2)
    tape = recorded(lambda x: table[x], torch.tensor([1, 2]))
    assert torch.equal(tape([torch.tensor([8, 0])])[0], table[[8, 0]])
