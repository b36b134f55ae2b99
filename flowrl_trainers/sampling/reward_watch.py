"""`RewardWatch`: what is odd about the rewards of a run, said once."""

import torch
from torch import Tensor

from ..rewards import Reward

HUGE = 1e6  # in size; float32 keeps seven digits, so differences of one are lost beyond 1e7
PATIENCE = 10  # rollouts without a difference within any prompt


class RewardWatch:
    """Looks at the scores of every rollout and says what a user should know, once for each reward.

    Args:
        rewards: R of them.
    """

    def __init__(self, rewards: list[Reward]) -> None:
        self.rewards = rewards
        self.said: set[tuple[str, str]] = set()
        self.flat = dict.fromkeys((r.name for r in rewards), 0)  # rollouts in a row in which no group had a difference

    def observe(self, scores: Tensor, groups: Tensor) -> list[str]:
        """One sentence for each thing that is odd and was not said before.

        Args:
            scores: (M, R) of all images of a rollout, NaN for None, infinite for what is invalid.
            groups: (M,), equal numbers for images of one prompt.
        """
        found = []
        _, member, sizes = groups.unique(return_inverse=True, return_counts=True)
        for reward, column in zip(self.rewards, scores.unbind(dim=1), strict=True):
            name, known = reward.name, column.isfinite()
            if not known.any():
                found.append((name, "silent", "has given no score so far: is it meant for these prompts?"))
                continue
            largest = float(column[known].abs().max())
            if largest > HUGE:
                found.append((name, "huge", f"gave a score of {largest:.3g}: divide it, as rounding grows with it."))
            if bool((sizes > 1).any()):
                self.flat[name] = self.flat[name] + 1 if self._is_flat(column, member, len(sizes)) else 0
                if self.flat[name] == PATIENCE:
                    text = f"was the same for all pictures of each prompt for {PATIENCE} rollouts: it teaches nothing."
                    found.append((name, "flat", text))
        fresh = [(name, text) for name, what, text in found if (name, what) not in self.said]
        self.said |= {(name, what) for name, what, _ in found}
        return [f"Reward {name!r} {text}" for name, text in fresh]

    @staticmethod
    def _is_flat(column: Tensor, member: Tensor, count: int) -> bool:
        """Whether no group (of `count`, by number) has two different scores."""
        known = column.isfinite()
        extremes = [column.new_full((count,), fill) for fill in (-torch.inf, torch.inf)]
        high = extremes[0].scatter_reduce(0, member[known], column[known], "amax")
        low = extremes[1].scatter_reduce(0, member[known], column[known], "amin")
        return not bool((high > low).any())
