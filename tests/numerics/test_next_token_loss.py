"""The loss on chosen tokens against torch's own cross entropy, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_scripts.objectives import next_token
from lora_scripts.objectives.next_token import Head, next_token_losses

N, D, V = 37, 16, 50


def reference(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    scores = (hidden @ head.weight.T + (head.bias if head.bias is not None else 0.0)) * head.scale
    if head.softcap is not None:
        scores = head.softcap * torch.tanh(scores / head.softcap)
    return nn.functional.cross_entropy(scores, targets, reduction="none")


def drawn(**options: object) -> tuple[torch.Tensor, Head, torch.Tensor]:
    torch.manual_seed(0)
    head = Head(torch.randn(V, D), **options)
    return torch.randn(N, D, requires_grad=True), head, torch.randint(V, (N,))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": torch.linspace(-1, 1, V)}, {"scale": 0.3}, {"softcap": 4.0}, {"scale": 2.0, "softcap": 3.0}],
)
@pytest.mark.parametrize("chunk_bytes", [1, 20 * 4 * V, 10**9], ids=["smallest", "two chunks", "one chunk"])
def test_losses_and_gradient_are_those_of_cross_entropy(
    options: dict, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_token, "CHUNK_BYTES", chunk_bytes)
    hidden, head, targets = drawn(**options)
    weights = torch.rand(N)  # the sum is not all that may be asked of the losses
    losses = next_token_losses(hidden, head, targets)
    (losses * weights).sum().backward()
    wanted = hidden.detach().clone().requires_grad_()
    expected = reference(wanted, head, targets)
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, wanted.grad, rtol=1e-5, atol=1e-5)


def test_bfloat16_scores_are_taken_in_float32() -> None:
    hidden, head, targets = drawn()
    half = Head(head.weight.bfloat16())
    losses = next_token_losses(hidden.bfloat16(), half, targets)
    assert losses.dtype is torch.float32
    torch.testing.assert_close(losses, reference(hidden, head, targets), rtol=0.05, atol=0.1)


def test_scores_of_all_tokens_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 16
    monkeypatch.setattr(next_token, "CHUNK_BYTES", rows * 4 * V)
    hidden, head, targets = drawn()
    seen = []
    scores = Head.scores
    monkeypatch.setattr(Head, "scores", lambda self, part: seen.append(len(part)) or scores(self, part))
    next_token_losses(hidden, head, targets)
    assert seen == [16, 16, 5]
