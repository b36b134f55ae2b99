"""`EstimateFit`: what the reward of a clean estimate says of the return, level by level."""

from collections.abc import Mapping

import torch
from torch import Tensor

KEPT = 0.9  # of the sums, from one rollout to the next
SMALLEST_SQUARE = 1e-6  # of shaped rewards, below which nothing can be fitted


class EstimateFit:
    """The factor c of each of K bins of noise levels that fits V = c s best to the returns r of earlier rollouts:
    c = sum r s / sum s^2, where s is the shaped reward of the clean estimate of one step. 0 before the first rollout.

    Rewards and returns are centred within their prompts, so that there is nothing else to fit. The rollout that is
    judged has no part in it, so that V does not know its returns.

    Args:
        bins: K.
        device: Of the rewards.
    """

    def __init__(self, bins: int, device: torch.device) -> None:
        self.products, self.squares = torch.zeros(2, bins, dtype=torch.float64, device=device)

    def factors(self) -> Tensor:
        """The factors c of the bins, (K,) float32."""
        return (self.products / self.squares.clamp(min=SMALLEST_SQUARE)).float()

    def observe(self, seen: Tensor, returns: Tensor) -> None:
        """Learn from a rollout.

        Args:
            seen: s of M images, (M, K).
            returns: Their r, (M,).
        """
        seen, returns = seen.double(), returns.double()
        self.products = KEPT * self.products + (returns[:, None] * seen).sum(dim=0)
        self.squares = KEPT * self.squares + seen.square().sum(dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {"products": self.products, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        self.products, self.squares = state["products"].clone(), state["squares"].clone()
