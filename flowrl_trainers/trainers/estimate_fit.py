"""`EstimateFit`: what the reward of a clean estimate says of the return, level by level."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

LEVELS = 10
KEPT = 0.9  # of the sums, from one rollout to the next
SMALLEST_SQUARE = 1e-6  # of shaped rewards, below which nothing can be fitted


class EstimateFit:
    """The factor c of each tenth of the noise levels that fits V = c s best to the returns r of earlier rollouts:
    c = sum r s / sum s^2, where s is the shaped reward of the clean estimate of one step. 0 before the first rollout.

    Rewards and returns are centred within their prompts, so that there is nothing else to fit. The rollout that is
    judged has no part in it, so that V does not know its returns. Tenths are our choice: the quarters from which
    states are drawn are too wide for one factor.

    Args:
        device: Of the rewards.
    """

    def __init__(self, device: torch.device) -> None:
        self.products, self.squares = torch.zeros(2, LEVELS, dtype=torch.float64, device=device)

    def factors(self, sigma: Tensor) -> Tensor:
        """The factors c (M, K), float32, at levels sigma (M, K)."""
        return (self.products / self.squares.clamp(min=SMALLEST_SQUARE)).float()[_tenths(sigma)]

    def observe(self, seen: Tensor, returns: Tensor, sigma: Tensor) -> None:
        """Learn from a rollout.

        Args:
            seen: s of M images, (M, K).
            returns: Their r, (M,).
            sigma: The levels, (M, K).
        """
        seen, returns = seen.double(), returns.double()
        of_level = one_hot(_tenths(sigma), LEVELS).double()
        self.products = KEPT * self.products + torch.einsum("mk,m,mkl->l", seen, returns, of_level)
        self.squares = KEPT * self.squares + torch.einsum("mk,mkl->l", seen.square(), of_level)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {"products": self.products, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        self.products, self.squares = state["products"].clone(), state["squares"].clone()


def _tenths(sigma: Tensor) -> Tensor:
    return (LEVELS * sigma).long().clamp(max=LEVELS - 1)
