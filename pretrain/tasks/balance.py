"""How the losses of several tasks become one: by fixed weights, or by weights learned from homoscedastic
uncertainty (Kendall, Gal and Cipolla, 2018, arXiv:1705.07115)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Likelihood = Literal["ce", "l1", "l2"]  # softmax, Laplace, Gaussian

# weight = factor * exp(-slope * s), with s = log variance
_FACTOR: dict[Likelihood, float] = {"ce": 1.0, "l1": 1.0, "l2": 0.5}
_SLOPE: dict[Likelihood, float] = {"ce": 1.0, "l1": 0.5, "l2": 1.0}


def settled_product(likelihood: Likelihood) -> float:
    """What w(s) * L comes to where a learned weight is at rest: d/ds of w(s) * L + s / 2 is 0 there."""
    return 1 / (2 * _SLOPE[likelihood])


class BalanceConfig(BaseModel):
    """Fixed or learned weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["fixed", "uncertainty"] = "uncertainty"
    initial_log_variance: float = 0.0  # of every task; 0 starts `ce` and `l1` at weight 1, `l2` at 1/2
    clamp: Annotated[float, Field(gt=0)] = 6.0  # weights are formed from log variances within [-clamp, clamp]


class Balance(nn.Module):
    """Total loss: the sum of weight * L (`fixed`), or of weight * (w(s) * L + s / 2) (`uncertainty`).

    w(s) is exp(-s) for `ce`, exp(-s / 2) for `l1`, exp(-s) / 2 for `l2`. One learned s per task; losses must
    not be negative, or s runs away. The total may be negative.
    """

    def __init__(
        self, likelihoods: Mapping[str, Likelihood], weights: Mapping[str, float], config: BalanceConfig
    ) -> None:
        super().__init__()
        assert likelihoods.keys() == weights.keys()
        self.config = config
        self.likelihoods = dict(likelihoods)
        self.weights = dict(weights)
        self.log_variances = nn.ParameterDict()
        if config.kind == "uncertainty":
            for name in likelihoods:
                # of shape (1,), because DeepSpeed takes no parameter without dimensions
                start = torch.tensor([config.initial_log_variance], dtype=torch.float32)
                self.log_variances[name] = nn.Parameter(start)

    def forward(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """losses: () of every task. Returns the total () in float32 and what each loss was multiplied by."""
        assert losses.keys() == self.weights.keys(), "every enabled task gives a loss"
        terms: list[Tensor] = []
        multipliers: dict[str, Tensor] = {}
        for name, loss in losses.items():
            with torch.autocast(loss.device.type, enabled=False):
                multiplier, penalty = self._multiplier(name, loss.device)
                terms.append(multiplier * loss.float() + penalty)
            multipliers[name] = multiplier.detach()
        return torch.stack(terms).sum(), multipliers

    def _multiplier(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        weight = torch.full((), self.weights[name], device=device)
        if self.config.kind == "fixed":
            return weight, torch.zeros((), device=device)
        log_variance = self.log_variances[name].float().squeeze(0)
        # The clamp lets the gradient through: if it did not, s/2 alone would push an s below -clamp further
        # away for ever.
        outside = log_variance.clamp(-self.config.clamp, self.config.clamp) - log_variance
        clamped = log_variance + outside.detach()
        kind = self.likelihoods[name]
        return weight * _FACTOR[kind] * torch.exp(-_SLOPE[kind] * clamped), weight * log_variance / 2
