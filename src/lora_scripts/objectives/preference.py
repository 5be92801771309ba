"""Learning from pairs of answers, of which one is preferred: DPO and ORPO.

Legend for shapes: B pairs.
Sources: Rafailov et al. 2023, arXiv 2305.18290, equation 7; Hong et al. 2024, arXiv 2403.07691, equations 3 to 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Preference", "dpo_losses", "orpo_losses"]


@dataclass(frozen=True)
class Preference:
    """How a pair's loss follows from the probabilities of its two answers.

    Attributes:
        beta: DPO: how strongly the model is held to its reference; ORPO: the weight of the odds ratio (the paper's lambda).
    """

    kind: Literal["dpo", "orpo"]
    beta: float

    def losses(self, log_probs: Tensor, counts: Tensor, reference: Tensor | None) -> Tensor:
        """[B] the loss of each pair, with gradient.

        Args:
            log_probs: [2,B] float32, log probability of the whole answer: of the preferred ones, of the others.
            counts: [2,B] tokens of each answer.
            reference: [2,B] the same log probabilities by the model as it was before; DPO alone needs them.
        """
        if self.kind == "dpo":
            assert reference is not None, "DPO compares with a reference"
            return dpo_losses(log_probs, reference, self.beta)
        return orpo_losses(log_probs / counts, self.beta)


def dpo_losses(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """[B] minus log sigmoid of beta times how much further apart the two answers are than for the reference; [2,B] each."""
    chosen, rejected = log_probs - reference
    return -F.logsigmoid(beta * (chosen - rejected))


def orpo_losses(means: Tensor, beta: float) -> Tensor:
    """[B] the preferred answer's own loss, and beta times minus log sigmoid of the logarithm of the odds ratio.

    Args:
        means: [2,B] mean log probability of a token of each answer.
    """
    chosen, rejected = means - _log_one_minus_exp(means)  # the logarithms of the odds p / (1 - p)
    return -means[0] - beta * F.logsigmoid(chosen - rejected)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 to full precision (Maechler 2012, "Accurately Computing log(1 - exp(-|a|))")."""
    x = x.clamp_max(-1e-7)  # a certain answer has infinite odds
    # Each branch is evaluated everywhere: the one not taken gets a harmless number, so that its gradient is no NaN.
    near = x > -0.6931
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
